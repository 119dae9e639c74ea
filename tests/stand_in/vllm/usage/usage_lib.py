"""From where an engine is asked for."""

from enum import Enum


class UsageContext(str, Enum):
    """The way that `vllm serve` goes."""

    OPENAI_API_SERVER = "OPENAI_API_SERVER"
