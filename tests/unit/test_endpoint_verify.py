"""endpoint_verify against a local TLS server that can misbehave in every way that the module looks for."""

from __future__ import annotations

import datetime
import ipaddress
import json
import re
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import (
    endpoint_ask,
    endpoint_checks,
    endpoint_keys,
    model_kinds,
)
from ansible_collections.gpufleet.llm.plugins.module_utils.endpoint import CheckError, Endpoint, row
from ansible_collections.gpufleet.llm.plugins.module_utils.endpoint_checks import Route
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

KEY = "sk-right"
MODEL = "tiny"
ALIAS = "gpt-4o"
UNKNOWN = {"error": {"message": "no such model", "type": "invalid_request_error", "code": "model_not_found"}}
NAME = "llm.test"


def certificate(directory: Path, days: int, names: tuple[str, ...] = (NAME,)) -> Path:
    """A self-signed certificate with its key in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.timezone.utc)
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=2))
        .not_valid_after(now + datetime.timedelta(days=days, hours=1))
        .add_extension(
            x509.SubjectAlternativeName(
                [*(x509.DNSName(name) for name in names), x509.IPAddress(ipaddress.ip_address("127.0.0.9"))]
            ),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = directory / f"certificate-{days}.pem"
    file.write_bytes(
        built.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return file


class Gateway(ThreadingHTTPServer):
    """A gateway as it should be, unless `fault` says what is wrong with it."""

    fault = ""
    busy = 0
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that refuse the certificate are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    """Answers like the gateway."""

    server: Gateway

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def send(self, status: int, body: object) -> None:
        """Send a JSON answer."""
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def allowed(self) -> bool:
        """Whether path and key are fine; if not, the refusal is sent."""
        fault = self.server.fault
        if self.path not in model_kinds.open_paths():
            self.send(200 if fault == "open path" else 404, {"error": {}})
            return False
        key = self.headers.get("Authorization")
        if key == f"Bearer {KEY}" or (fault == "any key" and key) or fault == "no key":
            return True
        self.send(401, {"error": {}})
        return False

    def do_GET(self) -> None:
        """List the models."""
        if self.server.busy:
            self.server.busy -= 1
            self.send_response(429)
            self.send_header("Retry-After", "7")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.allowed():
            fault = self.server.fault
            listed = {"another model": ["another"], "too many": [MODEL, "secret"]}.get(fault, [MODEL, ALIAS])
            more = {"root": "/srv/models/tiny"} if fault == "root" else {"root": None}
            self.send(200, {"object": "list", "data": [{"id": name, **more} for name in listed]})

    def do_POST(self) -> None:
        """Complete."""
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.allowed():
            return
        body = {} if self.headers["Content-Type"].startswith("multipart/") else json.loads(content)
        fault = self.server.fault
        if body.get("model") == endpoint_checks.NO_MODEL:
            told = (
                {"error": {**UNKNOWN["error"], "message": f"there is only {MODEL}"}}
                if fault == "tells models"
                else UNKNOWN
            )
            self.send(
                200 if fault == "any model" else 404, {"detail": "Not Found"} if fault == "vllm's shape" else told
            )
            return
        if fault == "no alias" and body.get("model") == ALIAS:
            self.send(404, UNKNOWN)
            return
        if fault == "slow":
            time.sleep(3)
        if fault in ("embeds", "embeds nothing"):  # no fault of the gateway's: vLLM with a model that does not generate
            if self.path != "/v1/embeddings":
                self.send(404, {"detail": "Not Found"})
            else:
                self.send(200, {"data": [{"embedding": [0.1, 0.2, 0.3]}] if fault == "embeds" else []})
        elif fault in ("hears", "ranks", "ranks, by a gateway", "nothing"):
            right: dict[str, object] = {"/v1/audio/transcriptions": {"text": ""}} if fault == "hears" else {}
            right |= {"/v1/rerank": {"results": [{"relevance_score": 0.5}]}} if fault.startswith("ranks") else {}
            lacking = (
                {"error": {**UNKNOWN["error"], "code": "not_found"}} if "gateway" in fault else {"detail": "Not Found"}
            )
            self.send(200 if self.path in right else 404, right.get(self.path, lacking))
        elif fault == "bad gateway":
            self.send(502, {"error": {"message": "no backend"}})
        elif fault == "no template" and self.path == endpoint_checks.CHAT:
            self.send(400, {"error": {"message": "default chat template is no longer allowed", "code": 400}})
        elif fault == "not a completion":
            self.send(200, {"hello": "world"})
        elif body.get("stream"):
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            events = [b'data: {"choices": [{"text": "x"}]}\n\n'] * (2 if fault == "few pieces" else 8)
            if fault == "buffered":
                time.sleep(0.1)
                events = [b"".join(events)]
            for event in events:
                self.wfile.write(event)
                self.wfile.flush()
                time.sleep(0.01)
            if fault != "cut":
                self.wfile.write(b"data: [DONE]\n\n")
        else:
            chat = self.path == "/v1/chat/completions"
            name = body["model"] if fault == "answers by the alias" else MODEL
            self.send(
                200, {"model": name, "choices": [{"message": {"content": "three"}} if chat else {"text": " three"}]}
            )


@pytest.fixture(scope="module")
def good_certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate that lasts."""
    return certificate(tmp_path_factory.mktemp("tls"), 90)


@pytest.fixture
def served(good_certificate: Path, request: pytest.FixtureRequest) -> Iterator[Gateway]:
    """The gateway; a parameter is the certificate to use instead of the good one."""
    gateway = Gateway(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(getattr(request, "param", None) or good_certificate)
    gateway.socket = context.wrap_socket(gateway.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=gateway.serve_forever, args=(0.05,), daemon=True).start()
    yield gateway
    gateway.shutdown()
    gateway.server_close()


def rows(
    gateway: Gateway, ca: Path | None, *, key: str = KEY, name: str = NAME, paths: list[str] | None = None
) -> dict[str, tuple[str, str]]:
    """What the module says, by check."""
    endpoint = Endpoint(
        f"https://{name}:{gateway.server_address[1]}", key, "127.0.0.1", str(ca) if ca else None, timeout=1
    )
    routes = [Route(MODEL, (ALIAS,), None if paths is None else tuple(paths))]
    found = endpoint_checks.verify(endpoint, routes, ["/metrics", "/invocations"], 7)
    return {row["check"]: (row["result"], row["detail"]) for row in found}


def failed(found: dict[str, tuple[str, str]]) -> dict[str, str]:
    """Only what failed."""
    return {check: detail for check, (result, detail) in found.items() if result != "ok"}


def test_a_good_gateway_passes_every_check(served: Gateway, good_certificate: Path) -> None:
    found = rows(served, good_certificate)
    assert failed(found) == {}
    assert list(found) == [
        "certificate",
        "key needed",
        "models",
        f"completion {MODEL}",
        f"streaming {MODEL}",
        f"alias {ALIAS}",
        "unknown model",
        "closed /metrics",
        "closed /invocations",
    ]
    assert "valid for 90 more days" in found["certificate"][1]


def test_chat_instead_of_completions(served: Gateway, good_certificate: Path) -> None:
    found = rows(served, good_certificate, paths=[endpoint_checks.CHAT])
    assert failed(found) == {}
    assert "'three'" in found[f"completion {MODEL}"][1]


def test_no_completions_are_asked_for_where_none_are_served(served: Gateway, good_certificate: Path) -> None:
    found = rows(served, good_certificate, paths=["/v1/models"])
    assert failed(found) == {}
    assert "models" in found
    assert f"completion {MODEL}" not in found


def test_a_model_that_completes_nothing_is_asked_for_an_embedding(served: Gateway, good_certificate: Path) -> None:
    served.fault = "embeds"
    found = rows(served, good_certificate)
    assert failed(found) == {}
    assert found[f"embedding {MODEL}"][1].startswith("3 numbers in ")
    assert not [check for check in found if check.startswith(("completion", "streaming"))]


@pytest.mark.parametrize(
    ("fault", "check", "detail"), [("hears", "transcription", "'' in "), ("ranks", "rank", "score 0.5 in ")]
)
def test_a_model_is_asked_for_what_it_is_for(
    served: Gateway, good_certificate: Path, fault: str, check: str, detail: str
) -> None:
    served.fault = fault
    found = rows(served, good_certificate)
    assert failed(found) == {}
    assert found[f"{check} {MODEL}"][1].startswith(detail)


def test_a_gateway_says_in_its_own_words_that_a_model_lacks_a_path(served: Gateway, good_certificate: Path) -> None:
    served.fault = "ranks, by a gateway"
    found = rows(served, good_certificate)
    assert failed(found) == {}
    assert f"rank {MODEL}" in found


def test_a_model_whose_paths_are_all_closed_is_told_with_those_that_would_open_it(
    served: Gateway, good_certificate: Path
) -> None:
    served.fault = "nothing"
    told = failed(rows(served, good_certificate, paths=["/v1/completions", "/v1/embeddings"]))
    assert list(told) == [f"model {MODEL}"]
    assert (
        "it answers none of /v1/completions, /v1/embeddings; `paths` of its route has to name" in told[f"model {MODEL}"]
    )
    assert "rank /v1/rerank /v1/score" in told[f"model {MODEL}"]


@pytest.mark.parametrize(
    ("fault", "checks", "says"),
    [
        ("no key", ["key needed"], "no key: 200 instead of 401"),
        ("any key", ["key needed"], "a wrong key: 200 instead of 401"),
        ("another model", ["models"], "not listed: tiny (listed: another)"),
        ("too many", ["models"], "listed and not of this client: secret"),
        ("root", ["models"], "the entry of tiny, gpt-4o tells a path of the server"),
        ("any model", ["unknown model"], "/v1/completions: 200 instead of 404"),
        ("tells models", ["unknown model"], "the error tells tiny"),
        ("vllm's shape", ["unknown model"], "/v1/completions: not the error model_not_found"),
        ("no alias", [f"alias {ALIAS}"], "/v1/completions: 404: "),
        ("answers by the alias", [f"alias {ALIAS}"], "the answer is of gpt-4o and not of tiny"),
        ("bad gateway", [f"completion {MODEL}", f"streaming {MODEL}", f"alias {ALIAS}"], "502: "),
        (
            "not a completion",
            [f"completion {MODEL}", f"streaming {MODEL}", f"alias {ALIAS}"],
            "no completion ('choices')",
        ),
        ("buffered", [f"streaming {MODEL}"], "all at once"),
        ("few pieces", [f"streaming {MODEL}"], "2 pieces only"),
        ("cut", [f"streaming {MODEL}"], "without [DONE]"),
        ("embeds nothing", [f"embedding {MODEL}", f"alias {ALIAS}"], "no embedding (list index out of range)"),
        ("open path", ["closed /metrics", "closed /invocations"], "GET is answered by 200 instead of 404"),
        ("slow", [f"completion {MODEL}", f"streaming {MODEL}", f"alias {ALIAS}"], "no answer in time"),
    ],
)
def test_each_fault_fails_its_check_and_no_other(
    served: Gateway, good_certificate: Path, fault: str, checks: list[str], says: str
) -> None:
    served.fault = fault
    found = failed(rows(served, good_certificate))
    assert list(found) == checks
    assert says in found[checks[0]]


def test_a_refused_key_is_told_apart_from_a_missing_model(served: Gateway, good_certificate: Path) -> None:
    found = failed(rows(served, good_certificate, key="sk-other"))
    assert found["models"].startswith("401")


def test_an_unknown_authority_ends_the_checks(served: Gateway) -> None:
    found = rows(served, None)
    assert list(found) == ["certificate"]
    assert "does not verify" in found["certificate"][1]


def test_another_name_is_refused(served: Gateway, good_certificate: Path) -> None:
    found = rows(served, good_certificate, name="other.test")
    assert list(found) == ["certificate"]
    assert "other.test" in found["certificate"][1]


def test_a_certificate_that_runs_out_soon_fails_and_the_rest_is_still_checked(tmp_path: Path) -> None:
    soon = certificate(tmp_path, 3)
    gateway = Gateway(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(soon)
    gateway.socket = context.wrap_socket(gateway.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=gateway.serve_forever, args=(0.05,), daemon=True).start()
    try:
        assert failed(rows(gateway, soon)) == {"certificate": "valid for 3 more days only"}
    finally:
        gateway.shutdown()
        gateway.server_close()


def test_nobody_there(good_certificate: Path) -> None:
    endpoint = Endpoint(f"https://{NAME}:1", KEY, "127.0.0.1", str(good_certificate), timeout=1)
    found = endpoint_checks.verify(endpoint, [Route(MODEL)], [], 7)
    assert [(row["check"], row["result"]) for row in found] == [("certificate", "FAILED")]
    assert "refused" in found[0]["detail"]


@pytest.mark.parametrize("url", ["http://llm.test", "llm.test", "https://llm.test/v1", "https://"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="https://NAME"):
        Endpoint(url, KEY)


def test_keys_that_are_taken_and_keys_that_are_refused(served: Gateway, good_certificate: Path) -> None:
    endpoint = Endpoint(f"https://{NAME}:{served.server_address[1]}", "", "127.0.0.1", str(good_certificate), timeout=1)
    keys = [
        endpoint_keys.Shown("old", False, "sk-old"), endpoint_keys.Shown("new", True, KEY), endpoint_keys.Shown("lost", True, "sk-lost"),
        endpoint_keys.Shown("leaked", False, KEY),
    ]  # fmt: skip
    found = endpoint_keys.check_keys(endpoint, keys)
    assert [(row["check"], row["result"], row["detail"].partition(":")[0]) for row in found] == [
        ("key new", "ok", "200, taken"),
        ("key lost", "FAILED", "401 instead of 200"),
        ("key old", "ok", "401, refused"),
        ("key leaked", "FAILED", "200 instead of 401"),
    ]
    assert not any(shown.key in repr(keys) for shown in keys)


@pytest.mark.parametrize(("busy", "result"), [(3, "ok"), (4, "FAILED")])
def test_a_key_that_is_over_its_rate_is_asked_about_again(
    served: Gateway, good_certificate: Path, busy: int, result: str
) -> None:
    endpoint = Endpoint(f"https://{NAME}:{served.server_address[1]}", "", "127.0.0.1", str(good_certificate), timeout=1)
    served.busy = busy
    waited: list[float] = []
    checked = row("key", lambda: endpoint_keys.check_key(endpoint, endpoint_keys.Shown("a", True, KEY), waited.append))
    assert checked["result"] == result
    assert waited == [7.0] * 3


# --- endpoint_ask


def asked(gateway: Gateway, ca: Path, paths: list[str] | None = None) -> dict[str, str]:
    """What the module says of the model."""
    endpoint = Endpoint(f"https://{NAME}:{gateway.server_address[1]}", KEY, "127.0.0.1", str(ca), timeout=1)
    [found] = endpoint_ask.rows(endpoint, [Route(MODEL, (), None if paths is None else tuple(paths))], "Who?", 8)
    assert found.pop("check") == f"ask {MODEL}"
    return found


def test_a_question_is_answered_with_times(served: Gateway, good_certificate: Path) -> None:
    found = asked(served, good_certificate)
    assert found["result"] == "ok", found
    assert re.fullmatch(r"first token after 0\.\d\d s, 8 pieces in \d\.\d\d s: xxxxxxxx", found["detail"])


def test_a_model_that_generates_nothing_is_asked_in_its_own_way(served: Gateway, good_certificate: Path) -> None:
    served.fault = "embeds"
    assert asked(served, good_certificate)["detail"].startswith("/v1/embeddings: 3 numbers in ")
    served.fault = "no template"
    assert asked(served, good_certificate)["detail"].endswith("xxxxxxxx")
    assert asked(served, good_certificate, [endpoint_checks.CHAT])["result"] == "FAILED"
    served.fault = "nothing"
    assert "it answers none of /v1/chat/completions, " in asked(served, good_certificate)["detail"]
    assert "its route has no path that can be asked" in asked(served, good_certificate, ["/v1/models"])["detail"]


@pytest.mark.parametrize(
    ("fault", "detail"),
    [
        ("cut", "the stream ended after 8 pieces without [DONE]"),
        ("bad gateway", "/v1/chat/completions: 502"),
        ("slow", "no answer in time"),
    ],
)
def test_a_question_that_is_not_answered(served: Gateway, good_certificate: Path, fault: str, detail: str) -> None:
    served.fault = fault
    found = asked(served, good_certificate)
    assert found["result"] == "FAILED"
    assert detail in found["detail"]


def test_what_a_piece_says() -> None:
    assert endpoint_ask.piece('{"choices": [{"delta": {"reasoning_content": "hm "}}]}') == "hm "
    assert endpoint_ask.piece('{"choices": [{"delta": {"content": "a", "role": "assistant"}}]}') == "a"
    assert endpoint_ask.piece('{"choices": [], "usage": {}}') == ""
    for broken in ("{", '{"error": {"message": "gone"}}'):
        with pytest.raises(CheckError):
            endpoint_ask.piece(broken)
