"""A stand-in for vLLM: a wheel called vllm, without dependencies, that behaves as vLLM does, faults included.

The role vllm installs it as it installs vLLM: from a lock (`vllm_lock_file`) and a directory of wheels (`uv_find_links`), both written by
`python -m tests.stand_in DIRECTORY`. Nothing else differs: the same role, units, launcher and configuration.

What it is held to is contract.py: one list of assertions, which runs on it (tests/unit/test_stand_in.py) and on the real CPU build
(molecule/vllm), so that it cannot drift from it.

How it misbehaves is commanded by a file, see vllm/stand_in/settings.py.
"""
