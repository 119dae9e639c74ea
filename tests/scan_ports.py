"""Sent to a test host by network.py: connects to each port of an address, thousands at the same time."""

from __future__ import annotations

import errno
import json
import resource
import select
import socket
import time

AT_ONCE = 6000
SECONDS = 0.8  # the hosts are on one bridge: an answer takes less than a millisecond, and the second SYN goes out after a second


def scan(address: str, ports: list[int]) -> dict[str, object]:
    """Which ports let us in, and how many said no."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    opened: list[int] = []
    refused = 0
    for start in range(0, len(ports), AT_ONCE):
        poll, waiting = select.epoll(), {}
        for port in ports[start : start + AT_ONCE]:
            one = socket.socket(family, socket.SOCK_STREAM)
            one.setblocking(False)
            status = one.connect_ex((address, port))
            if status not in (0, errno.EINPROGRESS):
                raise OSError(status, f"port {port} cannot be asked")
            waiting[one.fileno()] = (port, one)
            poll.register(one, select.EPOLLOUT)
        until = time.monotonic() + SECONDS
        while waiting and (left := until - time.monotonic()) > 0:
            for number, _ in poll.poll(left):
                port, one = waiting.pop(number)
                if one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                    opened.append(port)
                else:
                    refused += 1
                one.close()
        for _, one in waiting.values():
            one.close()
        poll.close()
    return {"open": sorted(opened), "refused": refused}


def main(address: str, ports: list[int]) -> None:
    """Print it."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, AT_ONCE + 100), most))
    print(json.dumps(scan(address, ports)))
