"""
The end-to-end list with vLLM in containers (`vllm_runtime: docker`): tests/e2e/test_fleet.py as it is, from bare hosts on. Its fleet has the same
name as that of `make e2e`: one of them at a time.

By hand, as root, where a Docker engine answers (half an hour on two cores; 12 GB on the disk):

    .venv/bin/pytest tests/drills/test_docker_fleet.py -s

What stands in is what stands in there, and for the image from a registry an archive: Debian 12 with the release of the other runtime
(tests/e2e/conftest.py). molecule/vllm_docker has a registry.
"""

from __future__ import annotations

from tests.drills import passes


def test_the_end_to_end_list_passes_with_containers() -> None:
    assert passes("-m", "pytest", "--verbose", "tests/e2e/test_fleet.py", E2E_RUNTIME="docker")
