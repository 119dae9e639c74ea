"""The CPU as a device."""

from . import Platform


class CpuPlatform(Platform):
    """A machine without an accelerator."""

    device_type = "cpu"
