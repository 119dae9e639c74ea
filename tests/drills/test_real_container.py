"""The real vLLM in a container, and beside it under systemd: molecule/vllm_docker, which `make test` runs with the stand-in for vLLM.

By hand, as root (half an hour on two cores):

    .venv/bin/pytest tests/drills/test_real_container.py -s
"""

from __future__ import annotations

from tests.drills import passes


def test_the_real_vllm_does_in_a_container_what_the_stand_in_does() -> None:
    assert passes("tests/run.py", "molecule", "vllm_docker", REAL_VLLM="1")
