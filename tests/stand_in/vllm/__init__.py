"""The stand-in for vLLM. What a role or an operator asks of vLLM's modules, and where it is here:

vllm.platforms                      current_platform, CpuPlatform: which device there is
vllm.utils.argparse_utils           FlexibleArgumentParser
vllm.entrypoints.cli.serve          make_arg_parser: what `vllm serve` accepts
vllm.entrypoints.cli.main           the program `vllm`
vllm.stand_in                       how it behaves, and how it misbehaves
"""

from importlib.metadata import version

__version__ = version("vllm")
