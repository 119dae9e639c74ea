"""What a request may have the real vLLM fetch, and what its unit may reach."""

from __future__ import annotations

import pytest
from testinfra.host import Host

from tests.sandbox import probe

testinfra_hosts = ["docker://vllm-debian12"]

# vLLM's own code, as an instance has it configured. What listens would be reached; the picture in `data:` is one pixel.
FETCH = r"""
import sys, yaml
from vllm.multimodal.media.connector import MediaConnector
domains = yaml.safe_load(open("/etc/vllm/chat/current/config.yaml"))["allowed-media-domains"]
for allowed in (domains, []):
    for url in sys.argv[1:]:
        try:
            print(MediaConnector(allowed_media_domains=allowed).fetch_image(url).size)
        except Exception as error:
            print(type(error).__name__, error)
"""
PIXEL = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
# sshd listens there, once the address is this host's.
LINK_LOCAL = "169.254.77.1"
CONNECT = f"""
import socket
for address in ("{LINK_LOCAL}", "127.0.0.1"):
    try:
        socket.create_connection((address, 22), 3).close()
        print("reached", address)
    except OSError as error:
        print("refused", address, error)
"""


def test_no_address_of_a_request_is_fetched(host: Host) -> None:
    """An empty list would be every domain: the last lines show that the first ones can fail."""
    address = "http://127.0.0.1:22/x.png"
    host.check_output(f"cat >/tmp/fetch.py <<'EOF'\n{FETCH}EOF")
    told = host.check_output(
        f"VLLM_MEDIA_FETCH_MAX_RETRIES=1 /opt/vllm/releases/*/bin/python /tmp/fetch.py {address} '{PIXEL}' 2>/dev/null"
    )
    refused, pixel, tried, _pixel = [line for line in told.splitlines() if "Error" in line or line.startswith("(")]
    assert "must be from one of the allowed domains: ['none.invalid']" in refused
    assert pixel == "(1, 1)"
    assert "allowed domains" not in tried


def test_nothing_link_local_is_reached_from_the_unit(host: Host) -> None:
    host.check_output(f"ip address add {LINK_LOCAL}/32 dev lo")
    try:
        good, told = probe(host.check_output, CONNECT)
    finally:
        host.check_output(f"ip address delete {LINK_LOCAL}/32 dev lo")
    assert good, told
    if "does not support BPF/cgroup firewalling" in told:
        pytest.skip("control groups of this machine are of version 1")
    assert f"refused {LINK_LOCAL}" in told, told
    assert "reached 127.0.0.1" in told, told
