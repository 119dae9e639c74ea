# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Kernels that vLLM compiles with nvcc at run time: how an instance finds a CUDA compiler, and what has to be off where there is none.

vLLM asks in most places whether nvcc and ninja are there before it takes a kernel that has to be compiled (has_flashinfer in its
utils/flashinfer.py), and takes another one. What stands here are the places that do not ask: the engine dies of them. Each was found by reading
the sources of 0.33.0, whose files are named; docs/gpu.md says what each costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Only zeros or a name: 1 makes vLLM fail where it does not support what it is asked for.
WITHOUT_COMPILER = {
    # v1/sample/ops/topk_topp_sampler.py: top-k and top-p, in the profile of every start, compute capability 8.0 and newer
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # distributed/device_communicators/cuda_communicator.py: all-reduce of 2, 4 or 8 GPUs of Hopper and Blackwell
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    # layers/fused_allreduce_gemma_rms_norm.py, models/common/ops/fused_allreduce_rms_norm.py: models that fuse all-reduce and norm do not read
    # the variable above; the workspace of this backend fails early, and they do without
    "VLLM_FLASHINFER_ALLREDUCE_BACKEND": "trtllm",
    # utils/deep_gemm.py: matrix products of FP8 models with scales for blocks, on Hopper and newer; DeepGEMM has no compiler but nvcc
    "VLLM_USE_DEEP_GEMM": "0",
}
# platforms/cuda.py: on Blackwell the first choice is FlashInfer's, and for a KV cache in FP8 on others than Hopper, too. There is no environment
# variable for it. Kinds that are not named choose by themselves.
ATTENTION_WITHOUT_COMPILER = {
    "backend_per_kind": {
        "full_attention": "TRITON_ATTN",
        "sliding_window": "TRITON_ATTN",
        "mla_attention": "TRITON_MLA",
    }
}
ATTENTION_OPTIONS = ("attention-config", "attention-backend")
BLACKWELL = 10
HOPPER = 9
# The PATH that systemd gives to a unit without one.
SYSTEMD_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin"


def environment(cuda_home: str, release_mount: str) -> dict[str, str]:
    """Environment of instances from a release: with a CUDA toolkit in `cuda_home` and the release's own ninja, or with an empty one without."""
    if not cuda_home:
        return dict(WITHOUT_COMPILER)
    return {"CUDA_HOME": cuda_home, "PATH": f"{release_mount}/bin:{cuda_home}/bin:{SYSTEMD_PATH}"}


def options(wanted: Mapping[str, Any], capabilities: Sequence[float]) -> dict[str, Any]:
    """Options that an instance needs beside its own where there is no compiler, on GPUs of these compute capabilities."""
    if any(name in wanted for name in ATTENTION_OPTIONS):
        return {}
    generations = {int(capability) for capability in capabilities}
    quantized = str(wanted.get("kv-cache-dtype", "auto")).startswith(("fp8", "nvfp4"))
    if BLACKWELL in generations or (quantized and generations - {HOPPER}):
        return {"attention-config": ATTENTION_WITHOUT_COMPILER}
    return {}
