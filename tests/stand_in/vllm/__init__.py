"""The stand-in for vLLM. What a role or an operator asks of vLLM's modules, and where it is here:

vllm.platforms                      current_platform, CpuPlatform: which device there is
vllm.utils.argparse_utils           FlexibleArgumentParser, which reads the configuration file
vllm.entrypoints.cli.serve          make_arg_parser, cmd_init, setup_server: what `vllm serve` accepts
vllm.engine.arg_utils               AsyncEngineArgs: what an engine would be started with
vllm.usage.usage_lib                UsageContext
vllm.entrypoints.cli.main           the program `vllm`
vllm.stand_in                       how it behaves, and how it misbehaves
"""

from importlib.metadata import version

__version__ = version("vllm")
