"""Which device vLLM runs on: the part of the version behind the plus says it, as it does for the real one."""

from __future__ import annotations

from importlib.metadata import version


class Platform:
    """A kind of device."""

    device_type = ""

    def is_unspecified(self) -> bool:
        """Whether vLLM found no device."""
        return not self.device_type

    def is_cpu(self) -> bool:
        return self.device_type == "cpu"

    def is_cuda(self) -> bool:
        return self.device_type == "cuda"


class CudaPlatform(Platform):
    """NVIDIA's GPUs."""

    device_type = "cuda"


def _current() -> Platform:
    from .cpu import CpuPlatform

    return CpuPlatform() if version("vllm").endswith("+cpu") else CudaPlatform()


current_platform = _current()
