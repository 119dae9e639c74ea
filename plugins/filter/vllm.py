"""Filters of the vllm role: the inventory checked, and turned into what the host needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import (
    vllm,
    vllm_container,
    vllm_files,
    vllm_fit,
    vllm_kernels,
    vllm_named_files,
    vllm_status,
)


def vllm_instance_problems(
    instances: Sequence[Mapping[str, Any]], device: str, table: Mapping[str, Any], allow_shared_gpus: bool = False
) -> list[str]:
    """Everything that is wrong with `vllm_instances`, one sentence each."""
    return vllm.instance_problems(instances, device, table, allow_shared_gpus)


def vllm_model_problems(
    instances: Sequence[Mapping[str, Any]], models: Sequence[Mapping[str, Any]], files: Sequence[Mapping[str, Any]] = ()
) -> list[str]:
    """Instances whose model, or one that their options name, nobody puts into the model store."""
    names = [str(model.get("name")) for model in models]
    return vllm.model_problems(instances, names, [str(file.get("name")) for file in files])


def vllm_file_problems(files: Sequence[Mapping[str, Any]], base: str) -> list[str]:
    """Everything that is wrong with `vllm_files`."""
    return vllm_files.problems(files, base)


def vllm_shipped_files(files: Sequence[Mapping[str, Any]], base: str, directory: str) -> dict[str, dict[str, str]]:
    """Name -> path on the host, hash and content of each of `vllm_files`."""
    return vllm_files.shipped(files, base, directory)


def vllm_named_problems(
    instances: Sequence[Mapping[str, Any]], files: Sequence[Mapping[str, Any]], environment: Mapping[str, Any]
) -> list[str]:
    """Files and models that options and environment name, and that nobody could find there."""
    names = dict.fromkeys(str(file.get("name")) for file in files)
    return [
        f"vllm_instances[{index}] ({instance.get('name')}): {problem}"
        for index, instance in enumerate(instances)
        for problem in vllm_named_files.problems(
            instance.get("options") or {}, {**environment, **(instance.get("environment") or {})}, names
        )
    ]


def vllm_host_problems(
    generations: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
    device: str,
    driver_due: bool = False,
    fit: str = "refuse",
) -> list[str]:
    """Everything on the host that stands in the way of its instances, as far as its facts tell."""
    return vllm_fit.problems(generations, facts, device, driver_due, fit)


def vllm_container_problems(generations: Sequence[Mapping[str, Any]], allow_tags: bool) -> list[str]:
    """Everything that is wrong with what the inventory says of containers."""
    return vllm_container.problems(generations, allow_tags)


def vllm_runs_in(instances: Sequence[Mapping[str, Any]], runtime: str, wanted: str) -> bool:
    """Whether any instance runs in the `wanted` runtime, where `runtime` is that of the host."""
    return vllm.runs_in(instances, runtime, wanted)


def vllm_wanted(instances: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the host needs for each instance."""
    return [vllm.wanted(instance, settings) for instance in instances]


def vllm_kernel_environment(cuda_home: str, release_mount: str) -> dict[str, str]:
    """Environment in which instances from a release find the CUDA toolkit in `cuda_home`, or do without when it is empty."""
    return vllm_kernels.environment(cuda_home, release_mount)


def vllm_status_of(
    instances: Sequence[Mapping[str, Any]],
    wanted: Sequence[Mapping[str, Any]],
    changed: Sequence[str],
    inputs: Mapping[str, Sequence[str]],
) -> list[dict[str, Any]]:
    """The instances of a host, and how each of them stands to the inventory."""
    return vllm_status.status(instances, wanted, changed, inputs)


def vllm_status_lines(instances: Sequence[Mapping[str, Any]]) -> list[str]:
    """The instances of a host as a table."""
    return vllm_status.lines(instances)


def vllm_revert_plan(
    instances: Sequence[Mapping[str, Any]], names: Sequence[str], generation: int = 0
) -> dict[str, Any]:
    """Where instances go back to, and why one cannot."""
    return vllm_status.revert_plan(instances, names, generation)


class FilterModule:
    """Tells Ansible the names."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Name -> function."""
        functions = (
            vllm_instance_problems,
            vllm_model_problems,
            vllm_file_problems,
            vllm_shipped_files,
            vllm_named_problems,
            vllm_host_problems,
            vllm_container_problems,
            vllm_runs_in,
            vllm_wanted,
            vllm_kernel_environment,
            vllm_status_of,
            vllm_status_lines,
            vllm_revert_plan,
        )
        return {function.__name__: function for function in functions}
