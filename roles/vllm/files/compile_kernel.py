"""Compiles a kernel as vLLM does at run time, loads it and runs it: by the Python of a release, in the sandbox of its unit.

It goes through FlashInfer's own builder, so nvcc, ninja, the headers, the flags and the libraries that are linked are those that kernels get.
Prints the last lines of what went wrong and ends with 1, or what it compiled for.
"""

import os
import sys
import tempfile
from pathlib import Path

# A header of each library that FlashInfer's kernels include.
SOURCE = """
#include <cub/cub.cuh>
#include <cuda.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <curand_kernel.h>
#include <cstdint>
#include <tvm/ffi/function.h>

__global__ void add_one(int64_t* value) { *value += 1; }

int64_t run(int64_t value) {
    int64_t* memory = nullptr;
    cudaError_t status = cudaMalloc(&memory, sizeof(value));
    if (status == cudaSuccess) status = cudaMemcpy(memory, &value, sizeof(value), cudaMemcpyHostToDevice);
    if (status == cudaSuccess) {
        add_one<<<1, 1>>>(memory);
        status = cudaMemcpy(&value, memory, sizeof(value), cudaMemcpyDeviceToHost);
    }
    cudaFree(memory);
    return status == cudaSuccess ? value : -static_cast<int64_t>(status);
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(run, run);
"""
LINES = 15
# cudaErrorMemoryAllocation: what runs has all of the GPU. The kernel was compiled, linked and loaded then, which is what a compiler can fail at.
NO_MEMORY = -2


def compiled() -> str:
    """Compile, load, run; return for which architectures."""
    from flashinfer.compilation_context import CompilationContext
    from flashinfer.jit.core import gen_jit_spec

    source = Path(os.environ["FLASHINFER_WORKSPACE_BASE"], "proof.cu")
    source.write_text(SOURCE)
    answer = gen_jit_spec("fleet_proof", [source]).build_and_load().run(41)
    if answer not in (42, NO_MEMORY):
        reason = f"CUDA error {-answer}" if answer < 0 else f"41 + 1 is {answer} there"
        raise RuntimeError(f"the kernel was compiled and loaded, but it does not run: {reason}")
    note = ", and not run: the GPU has no memory left" if answer == NO_MEMORY else ""
    return str(sorted(CompilationContext().TARGET_CUDA_ARCHS)) + note


def main() -> int:
    """Try it where nothing that was compiled before is found."""
    with tempfile.TemporaryDirectory() as directory:
        os.environ["FLASHINFER_WORKSPACE_BASE"] = directory
        try:
            print(f"compiled for {compiled()}")
        except Exception as error:  # whatever it is, it is what vLLM would meet
            lines = [line for line in str(error).splitlines() if line.strip()]
            print(f"{type(error).__name__}:", "\n".join(lines[-LINES:]), file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
