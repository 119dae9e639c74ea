"""The parser that vLLM's options are given to."""

from argparse import ArgumentParser


class FlexibleArgumentParser(ArgumentParser):
    """vLLM's own takes more spellings of a name; a configuration file has one."""
