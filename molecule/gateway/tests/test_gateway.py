"""The gateway as its clients meet it.

Behind it is the stand-in for vLLM (tests/stand_in), twice, which says what came; real vLLM is behind it in tests/e2e.

Requests go over the network from outside the host, on sockets of our own: HTTP libraries tidy up paths.
"""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import model_kinds
from testinfra.host import Host

from tests.roles import applied, refused, until

TEAM_A = "aaaaaaaaaaaaaaaa-0123456789abcdef"
SLOW = "bbbbbbbbbbbbbbbb-0123456789abcdef"
NARROW = "cccccccccccccccc-0123456789abcdef"
DEFAULT = "dddddddddddddddd-0123456789abcdef"
INTERNAL = "internal-0123456789abcdef0123456789abcdef"
CHAT = "/v1/chat/completions"
POSTS = [path for path in model_kinds.open_paths() if path != model_kinds.MODELS]
# What vLLM answers without a key, or must never be asked from outside: docs.vllm.ai/en/latest/usage/security, and the routes that
# vLLM 0.32 and 0.33 list in their log.
FORBIDDEN = [
    "/invocations", "/tokenize", "/detokenize", "/metrics", "/version", "/load", "/ping", "/docs",
    "/redoc", "/openapi.json", "/kv_event_sources", "/scale_elastic_ep", "/is_scaling_elastic_ep",
    "/generative_scoring", "/pooling", "/score", "/rerank", "/v2/rerank", "/v2/embed", "/v1/messages", "/v1/realtime",
    "/pause", "/resume", "/sleep", "/wake_up", "/reset_prefix_cache", "/server_info", "/collective_rpc",
    "/update_weights", "/init_weight_transfer_engine", "/abort_requests", "/start_profile", "/tokenizer_info",
    "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/chat/completions/render", "/inference/v1/generate",
    "/cohere/v2/embed", "/v1/responses/resp_1", "/v1/audio", "/v1", "/v1/", "/", "/.git/config",
]  # fmt: skip
# Written by a client so that the match and what vLLM sees might differ.
SMUGGLED = [
    "/invocations/../v1/models", "//v1/models", "/v1/models%2f..", "/v1/%6dodels", "/v1/./models",
    "/v1/models?x=/metrics", "/v1/models/../../metrics", "/v1/models%2f..%2f..%2fmetrics", "/v1/models/..;/metrics",
    "/v1/models%00", "/v1/models%20", "/V1/MODELS", "/metrics?/v1/models", "/metrics#/v1/models", "/%2e%2e/metrics",
    "/v1/models%3f/../../metrics",
]  # fmt: skip


@dataclass
class Answer:
    """What a client got."""

    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def error(self) -> dict[str, Any]:
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}, error
        assert self.headers["content-type"] == "application/json"
        return dict(error)

    @property
    def upstream_headers(self) -> dict[str, str]:
        return dict(self.json["headers"])


class Gateway:
    """A client of the gateway."""

    def __init__(self, host: Host) -> None:
        self.name = host.backend.hostname.removeprefix("docker://")
        self.address = subprocess.run(
            ["docker", "inspect", "--format", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", self.name],
            check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
        self.tls = ssl.create_default_context(cadata=host.file("/etc/ssl/vllm-fleet/ca.pem").content_string)

    def connect(self, server_name: str = "llm.test") -> ssl.SSLSocket:
        return self.tls.wrap_socket(
            socket.create_connection((self.address, 443), timeout=15), server_hostname=server_name
        )

    def raw(self, data: bytes) -> bytes:
        """Send bytes and return everything that comes back."""
        with self.connect() as connection:
            connection.sendall(data)
            received = b""
            while part := connection.recv(65536):
                received += part
        return received

    def ask(
        self,
        path: str,
        key: str | None = TEAM_A,
        body: Any = None,
        method: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        connection = http.client.HTTPConnection(self.address)
        connection.sock = self.connect()
        method = method or ("POST" if path in POSTS else "GET")
        data = body if isinstance(body, bytes) else json.dumps({"model": "fake", **(body or {})}).encode()
        everything = {"Host": "llm.test", **({"Authorization": f"Bearer {key}"} if key else {}), **(headers or {})}
        if method == "POST":
            everything["Content-Length"] = str(len(data))
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in everything.items():
            connection.putheader(name, value)
        connection.endheaders()
        try:
            if method == "POST":
                connection.send(data)
        except OSError:
            pass  # refused before it was read; the answer says why
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, text)


def commanded(answers: str, seconds: float = 0.02) -> dict[str, Any]:
    """The body of a chat of one token that the stand-in is to answer like this, with so many seconds for a token."""
    messages = [{"role": "user", "content": "Hi"}]
    return {
        "model": "fake",
        "messages": messages,
        "max_tokens": 1,
        "stand_in": {"answers": answers, "seconds_per_token": seconds},
    }


@pytest.fixture(scope="module")
def gateway(host: Host) -> Gateway:
    return Gateway(host)


@pytest.fixture
def both_up(host: Host) -> Iterator[None]:
    """Whatever the test does to the backends, the next one finds both."""
    yield
    host.check_output("systemctl start stand-in@1 stand-in@2")
    host.check_output(
        "timeout 60 sh -c 'for i in 1 2; do until curl -sf http://10.99.0.$i:8000/health; do sleep 0.1; done; done'"
    )


# --- who is let in


def test_a_key_is_let_in_and_the_internal_key_goes_on(gateway: Gateway) -> None:
    answer = gateway.ask(CHAT)
    assert answer.status == 200
    assert answer.upstream_headers["authorization"] == f"Bearer {INTERNAL}"
    assert TEAM_A not in answer.text


@pytest.mark.parametrize("headers", [{"Authorization": f"bearer {TEAM_A}"}, {"x-api-key": TEAM_A}, {"api-key": TEAM_A}])
def test_it_may_come_as_other_libraries_send_it(gateway: Gateway, headers: dict[str, str]) -> None:
    answer = gateway.ask(CHAT, key=None, headers=headers)
    assert answer.status == 200
    assert TEAM_A not in answer.text


@pytest.mark.parametrize(
    "authorization",
    [
        None, "", f"Bearer {TEAM_A.upper()}", f"Basic {TEAM_A}", TEAM_A,
        f"Bearer {TEAM_A}x", f"Bearer {TEAM_A[:-1]}", f"Bearer  {TEAM_A}", f"Bearer {TEAM_A},", f"Bearer {INTERNAL}",
        "Bearer", "Bearer .*", f"Bearer x {TEAM_A}",
    ],
)  # fmt: skip
def test_everything_else_is_not(gateway: Gateway, authorization: str | None) -> None:
    answer = gateway.ask(CHAT, key=None, headers={} if authorization is None else {"Authorization": authorization})
    assert answer.status == 401
    assert answer.error["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"


def test_two_keys_are_no_key(gateway: Gateway) -> None:
    head = "GET /v1/models HTTP/1.1\r\nHost: llm.test\r\nConnection: close\r\n"
    head += f"Authorization: Bearer {TEAM_A}\r\nAuthorization: Bearer wrong\r\n\r\n"
    assert gateway.raw(head.encode()).split(b" ")[1] in (b"400", b"401")


# --- what is let through


@pytest.mark.parametrize("path", POSTS)
def test_the_api_is_let_through(gateway: Gateway, path: str) -> None:
    answer = gateway.ask(path)
    assert (answer.status, answer.json["path"]) == (200, path)


@pytest.mark.parametrize("path", FORBIDDEN)
def test_nothing_else_is(gateway: Gateway, path: str) -> None:
    for method in ("GET", "POST"):
        answer = gateway.ask(path, method=method)
        assert answer.status == 404, answer.text
        assert answer.error["code"] == "not_found"


@pytest.mark.parametrize("path", SMUGGLED)
def test_the_backend_never_sees_a_path_of_the_clients(gateway: Gateway, path: str) -> None:
    answer = gateway.ask(path)
    if answer.status == 200:
        assert answer.json["object"] == "list"  # what the gateway itself says
    else:
        assert answer.status in (400, 404)


def test_a_query_is_dropped(gateway: Gateway) -> None:
    assert gateway.ask("/v1/chat/completions?key=1&x=y", method="POST").json["path"] == CHAT


@pytest.mark.parametrize(("path", "method", "allowed"), [
    (CHAT, "GET", "POST"), (CHAT, "PUT", "POST"), (CHAT, "DELETE", "POST"), (CHAT, "OPTIONS", "POST"),
    ("/v1/models", "POST", "GET, HEAD"), ("/v1/models", "DELETE", "GET, HEAD"), ("/v1/models", "PATCH", "GET, HEAD"),
])  # fmt: skip
def test_a_wrong_method_is_told_the_right_one(gateway: Gateway, path: str, method: str, allowed: str) -> None:
    answer = gateway.ask(path, method=method)
    assert (answer.status, answer.headers["allow"]) == (405, allowed)
    assert answer.error["code"] == "method_not_allowed"


def test_what_a_client_says_about_itself_stays_outside(gateway: Gateway) -> None:
    lies = {
        "X-Forwarded-For": "192.0.2.99", "X-Real-IP": "192.0.2.99", "Forwarded": "for=192.0.2.99",
        "X-Request-Id": "192.0.2.99", "X-Forwarded-Host": "192.0.2.99", "Cookie": "a=192.0.2.99",
        "X-Data-Parallel-Rank": "0", "X_Forwarded_For": "192.0.2.99",
    }  # fmt: skip
    answer = gateway.ask(CHAT, headers=lies)
    assert "192.0.2.99" not in answer.text
    sent = answer.upstream_headers
    assert sent["x-request-id"] == answer.headers["x-request-id"]
    assert len(sent["x-request-id"]) == 32
    assert sent["host"] == "vllm"
    assert sent["x-forwarded-for"] == gateway.address.rpartition(".")[0] + ".1"
    assert "x-data-parallel-rank" not in sent


# --- errors


def test_a_body_that_is_too_large(gateway: Gateway) -> None:
    most = b'{"model":"fake"' + b" " * (1024 * 1024 - 16) + b"}"
    answer = gateway.ask(CHAT, body=most + b" ")
    assert answer.status == 413
    assert answer.error["code"] == "request_too_large"
    assert gateway.ask(CHAT, body=most).json["size"] == 1024 * 1024


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET /v1/models HTTP/1.1\r\nBroken", b"400"),
        (b"GET /" + b"x" * 20000 + b" HTTP/1.1", b"414"),
        (b"GET / HTTP/1.1\r\nHost: llm.test\r\nX: " + b"x" * 20000, b"400"),
    ],
    ids=["no-host", "long-path", "long-header"],
)  # fmt: skip
def test_malformed_requests_get_json(gateway: Gateway, request_line: bytes, status: bytes) -> None:
    head, _, body = gateway.raw(request_line + b"\r\n\r\n").partition(b"\r\n\r\n")
    assert head.split(b" ")[1] == status
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_what_vllm_says_of_a_bad_question_is_passed_on(gateway: Gateway) -> None:
    answer = gateway.ask(CHAT, body=commanded("400"))
    assert answer.status == 400
    assert answer.json["error"]["type"] == "from_vllm"


def test_where_all_backends_are_full_the_client_is_told_when_to_try_again(gateway: Gateway) -> None:
    answer = gateway.ask(CHAT, body=commanded("503"))
    assert answer.status == 503
    assert answer.error["code"] == "unavailable"
    assert int(answer.headers["retry-after"]) > 0


def test_backends_that_break_off_are_502(gateway: Gateway) -> None:
    answer = gateway.ask(CHAT, body=commanded("drop"))
    assert answer.status == 502
    assert answer.error["code"] == "bad_gateway"


def test_a_backend_that_hangs_is_504(gateway: Gateway) -> None:
    answer = gateway.ask(CHAT, body=commanded("hang"))
    assert answer.status == 504
    assert answer.error["code"] == "timeout"


# --- backends


def test_both_backends_are_used(gateway: Gateway) -> None:
    time.sleep(10)  # so long the failures of the tests before count as load
    assert {gateway.ask(CHAT).json["backend"] for _ in range(16)} == {"1", "2"}


@pytest.mark.usefixtures("both_up")
def test_a_dead_backend_costs_no_request(gateway: Gateway, host: Host) -> None:
    host.check_output("systemctl stop stand-in@1")
    assert [gateway.ask(CHAT).status for _ in range(12)] == [200] * 12


@pytest.mark.usefixtures("both_up")
def test_without_backends_the_client_is_told(gateway: Gateway, host: Host) -> None:
    host.check_output("systemctl stop stand-in@1 stand-in@2")
    for _ in range(8):
        answer = gateway.ask(CHAT)
        assert answer.status in (502, 503)
        assert answer.error["type"] == "server_error"


# --- streaming


def stream(gateway: Gateway, tokens: int = 8) -> Iterator[tuple[float, bytes]]:
    """Ask for a stream; yield what arrives with the time of its arrival."""
    body = json.dumps({**commanded("right", 0.3), "max_tokens": tokens, "stream": True}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: llm.test\r\nConnection: close\r\n"
    head += f"Authorization: Bearer {TEAM_A}\r\nContent-Length: {len(body)}\r\n\r\n"
    with gateway.connect() as connection:
        connection.sendall(head.encode() + body)
        while part := connection.recv(65536):
            yield time.monotonic(), part


def test_a_stream_arrives_piece_by_piece(gateway: Gateway) -> None:
    arrived = [(when, part) for when, part in stream(gateway) if b"data: " in part]
    # Eight tokens of 0.3 seconds: a busy machine may read two at once, a gateway that collects them sends one piece.
    assert len(arrived) >= 5
    assert arrived[-1][0] - arrived[0][0] > 1.5


def test_a_reload_does_not_cut_a_stream(gateway: Gateway, host: Host) -> None:
    received = b""
    for number, (_, part) in enumerate(stream(gateway)):
        received += part
        if number == 2:
            host.check_output("systemctl reload nginx")
    assert received.count(b"data: ") == 10, "a role, eight tokens and an end"
    assert b"[DONE]" in received


# --- limits


def test_a_client_beyond_its_rate_waits_and_others_do_not(gateway: Gateway) -> None:
    answers = [gateway.ask(CHAT, key=SLOW) for _ in range(6)]
    # one, and the burst of two
    assert [answer.status for answer in answers] == [200] * 3 + [429] * 3
    assert answers[-1].error["type"] == "rate_limit_error"
    assert answers[-1].headers["retry-after"] == "10"
    assert gateway.ask(CHAT, key=TEAM_A).status == 200


def test_a_client_beyond_its_concurrency_is_refused_and_others_are_not(gateway: Gateway) -> None:
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        running = [pool.submit(gateway.ask, CHAT, NARROW, commanded("right", 1.5)) for _ in range(5)]
        other = pool.submit(gateway.ask, CHAT, TEAM_A, commanded("right", 1.5))
        statuses = sorted(future.result().status for future in running)
        assert other.result().status == 200
    assert statuses == [200, 200, 429, 429, 429]
    assert gateway.ask(CHAT, key=NARROW).status == 200


def test_guessing_keys_is_slowed_down(host: Host, gateway: Gateway) -> None:
    """From the host itself, an address of its own: the other tests are refused often enough."""
    guess = f"curl -sk -o /dev/null -w '%{{http_code}} %header{{retry-after}}\\n' -H 'Authorization: Bearer guess' https://127.0.0.1{CHAT}"
    body = f"curl -sk -H 'Authorization: Bearer guess' https://127.0.0.1{CHAT}"
    # one command: an address gets a try back every two seconds
    told = host.check_output(f"for i in $(seq 80); do {guess}; done; {body}").splitlines()
    assert told[0].startswith("401")
    assert told[79].split() == ["429", "2"]
    assert json.loads("".join(told[80:]))["error"]["code"] == "rate_limit_exceeded"
    assert gateway.ask(CHAT).status == 200


# --- the outside


def test_http_is_sent_to_https(gateway: Gateway) -> None:
    connection = http.client.HTTPConnection(gateway.address, timeout=5)
    connection.request("GET", "/v1/models", headers={"Host": "llm.test"})
    response = connection.getresponse()
    assert (response.status, response.getheader("Location")) == (308, "https://llm.test/v1/models")


def test_another_name_gets_no_answer(gateway: Gateway) -> None:
    with pytest.raises(ConnectionError):
        gateway.ask("/v1/models", headers={"Host": "evil.test"})
    connection = http.client.HTTPConnection(gateway.address, timeout=5)
    connection.request("GET", "/", headers={"Host": "evil.test"})
    with pytest.raises(ConnectionError):
        connection.getresponse()


def test_health_needs_no_key_and_headers_are_right(gateway: Gateway) -> None:
    answer = gateway.ask("/healthz", key=None)
    assert (answer.status, answer.json["status"]) == (200, "ok")
    answer = gateway.ask(CHAT)
    assert answer.headers["strict-transport-security"] == "max-age=63072000"
    assert answer.headers["server"] == "nginx"
    assert "retry-after" not in answer.headers


def test_mozillas_intermediate_profile_is_met(gateway: Gateway) -> None:
    """By sslyze, a judge of its own. Only that nobody else trusts the authority of this host may displease it."""
    command = [sys.executable, "-m", "sslyze", "--mozilla_config=intermediate", gateway.address]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    verdict = done.stdout.rpartition("COMPLIANCE AGAINST")[2]
    findings = [line.split()[1] for line in verdict.splitlines() if line.strip().startswith("* ")]
    assert findings == ["certificate_path_validation:"], done.stdout


# --- secrets and the log


def test_the_log_says_who_and_never_the_key(gateway: Gateway, host: Host) -> None:
    request_id = gateway.ask(f"{CHAT}?secret-argument", method="POST").headers["x-request-id"]
    gateway.ask(CHAT, key=TEAM_A.upper())
    # nginx writes the line after it has answered
    host.check_output("timeout 30 sh -c 'until grep -q %s /var/log/nginx/access.log; do sleep 0.1; done'", request_id)
    lines = [
        json.loads(line)
        for line in host.file("/var/log/nginx/access.log").content_string.splitlines()
        if line.startswith('{"time"')
    ]
    entry = next(line for line in lines if line["request_id"] == request_id)
    assert (entry["client"], entry["uri"], entry["status"], entry["method"]) == ("team-a", CHAT, "200", "POST")
    assert (entry["model"], entry["route"], entry["backend"].partition("@")[0]) == ("fake", "chat", "chat")
    assert entry["upstream_addr"] in ("10.99.0.1:8000", "10.99.0.2:8000")
    assert float(entry["time_to_first_byte"]) >= 0
    for secret in (TEAM_A, SLOW, INTERNAL):
        assert host.run(f"grep -ri -e {secret} /var/log").stdout == ""
        assert host.run(f"journalctl --no-pager | grep -i -e {secret}").stdout == ""
        assert secret not in host.check_output("ps axww -o args | grep -v grep")
    assert "secret-argument" not in host.file("/var/log/nginx/access.log").content_string


def test_no_key_of_a_client_is_on_the_host_and_the_internal_one_only_for_root(host: Host) -> None:
    for name, mode in (("internal_key", 0o600), ("fleet.json", 0o640)):
        file = host.file(f"/etc/vllm-gateway/{name}")
        assert (file.user, file.mode) == ("root", mode)
    assert host.run(f"grep -rl {TEAM_A} /etc /usr/local /run/vllm-gateway").stdout == ""
    assert host.run(f"grep -rl {INTERNAL} /etc /usr/local /run/vllm-gateway").stdout.split() == [
        "/etc/vllm-gateway/internal_key"
    ]
    assert host.run("runuser -u nobody -- ls /run/vllm-gateway").rc != 0


# --- changes


@pytest.mark.one_host
def test_a_configuration_that_nginx_refuses_changes_nothing(gateway: Gateway, host: Host) -> None:
    before = host.file("/etc/nginx/nginx.conf").content_string
    assert "nginx -t -q' ended with 1" in refused(host, "gateway", gateway_tls_certificate_file="/etc/hostname")
    assert host.file("/etc/nginx/nginx.conf").content_string == before
    assert host.run("nginx -t").rc == 0
    assert gateway.ask(CHAT).status == 200


@pytest.mark.one_host
def test_a_new_key_replaces_the_old_one_everywhere(gateway: Gateway, host: Host) -> None:
    new = "eeeeeeeeeeeeeeee-0123456789abcdef"
    clients = [{"name": "team-a", "key": new, "requests_per_minute": 60000, "concurrent_requests": 100}]
    pid = host.check_output("systemctl show --property=MainPID nginx")
    try:
        told = applied(host, "gateway", "--diff", gateway_clients=clients)
        assert new not in told
        assert TEAM_A not in told
        assert gateway.ask(CHAT, key=new).status == 200
        assert gateway.ask(CHAT, key=TEAM_A).status == 401
    finally:
        applied(host, "gateway")
    assert gateway.ask(CHAT, key=TEAM_A).status == 200
    assert host.check_output("systemctl show --property=MainPID nginx") == pid


SHORT = {"name": "x", "key": "TOP-SECRET", "requests_per_minute": 1, "concurrent_requests": 1}
BAD_INPUT = [
    ("gateway_routes", [{"model": "a", "instance": "nowhere"}], "no host of the group gateway_backends has it"),
    ("gateway_internal_key", "short-secret", "gateway_internal_key (default: vllm_internal_key)"),
    ("gateway_tls_certificate_file", "/nowhere.pem", "/nowhere.pem (gateway_tls_certificate_file) is not on"),
    ("gateway_clients", [SHORT], "the key of x"),
]


@pytest.mark.one_host
@pytest.mark.parametrize(("variable", "value", "message"), BAD_INPUT, ids=range(len(BAD_INPUT)))
def test_bad_input_is_refused_before_anything_changes(host: Host, variable: str, value: Any, message: str) -> None:
    output = refused(host, "gateway", **{variable: value})
    assert message in output
    assert "changed=0" in output
    assert "TOP-SECRET" not in output
    assert "short-secret" not in output


# --- the service


def test_a_stop_waits_for_a_stream(gateway: Gateway, host: Host) -> None:
    received = b""
    try:
        for number, (_, part) in enumerate(stream(gateway)):
            received += part
            if number == 2:
                host.check_output("systemctl stop --no-block nginx")
        assert b"[DONE]" in received
    finally:
        host.check_output("systemctl stop nginx && systemctl start nginx")
    assert gateway.ask(CHAT).status == 200


def main_process(host: Host) -> str:
    """The process of Nginx that systemd knows."""
    found: str = host.check_output("systemctl show --property=MainPID --value nginx")
    return found


def without_a_cut(gateway: Gateway, host: Host, command: str) -> str:
    """Run a command on the gateway while a stream runs, and requests come by connections of their own; returns what it printed."""
    over = threading.Event()

    def ask() -> int:
        asked = 0
        while not over.is_set():
            assert gateway.ask("/healthz", None).status == 200
            asked += 1
            time.sleep(0.02)
        return asked

    with concurrent.futures.ThreadPoolExecutor() as threads:
        received = threads.submit(lambda: b"".join(part for _, part in stream(gateway, tokens=80)))  # 24 s
        asked = threads.submit(ask)
        try:
            time.sleep(1)
            began = time.monotonic()
            told: str = host.check_output(command)
            print(f"{command.split()[-1]}: {time.monotonic() - began:.1f} s")
            assert not received.done(), "the stream was over before the command: it shows nothing"
        finally:
            over.set()
        assert b"[DONE]" in received.result()
        assert asked.result() > 10
    return told


def test_an_upgrade_of_the_package_cuts_nothing(gateway: Gateway, host: Host) -> None:
    """A new Nginx takes over the sockets, and the one of before ends its requests."""
    before = main_process(host)
    host.check_output("apt-get update")
    install = "DEBIAN_FRONTEND=noninteractive apt-get install --yes --reinstall"
    without_a_cut(gateway, host, f"{install} libnginx-mod-http-lua nginx")
    until(lambda: main_process(host) not in ("0", before), 30, "it is the Nginx of before")
    assert host.service("nginx").is_running


def test_new_libraries_cut_nothing(gateway: Gateway, host: Host) -> None:
    """needrestart, which comes with every upgrade of Ubuntu, would restart Nginx: for as long as the longest answer, nobody could connect."""
    install = "DEBIAN_FRONTEND=noninteractive apt-get install --yes"
    host.check_output(f"{install} --no-install-recommends needrestart")
    # what stands behind this gateway is on the same host; of vLLM's own units the role base says it
    host.check_output("echo '$nrconf{override_rc}{qr(^stand-in)} = 0;' >/etc/needrestart/conf.d/test.conf")
    library = host.check_output(
        "dpkg-query --show --showformat '${db:Status-Abbrev} ${Package}\\n' 'libssl3*' | sed --quiet 's/^ii *//p'"
    )
    host.check_output(f"NEEDRESTART_SUSPEND=1 {install} --reinstall {library}")
    before = main_process(host)
    told = without_a_cut(gateway, host, "needrestart -r a 2>&1")
    assert "nginx.service" in told
    until(lambda: main_process(host) not in ("0", before), 30, f"it is the Nginx of before: {told}")
