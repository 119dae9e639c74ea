"""What a request needs to reach a backend, and what reaches it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.backends import INTERNAL, Backend, tokens
from tests.gateway.harness import CHAT, KEY, Gateway, document, route, running, sha256

OTHER, NARROW, NONE, OLD, LATER = (f"{name}-0123456789abcdef!~" for name in ("other", "narrow", "none", "old", "later"))
FIRST, SECOND, SOUND = Backend("chat@gpu-1"), Backend("code@gpu-2"), Backend("hear@gpu-1", "::1")
TRANSCRIPTIONS = "/v1/audio/transcriptions"
CLIENTS: dict[str, dict[str, Any]] = {"team-a": {}, "other": {}, "narrow": {"models": ["big"]}, "none": {"models": []}}
KEYS: dict[str, dict[str, Any]] = {
    KEY: {"client": "team-a"}, OTHER: {"client": "other"}, NARROW: {"client": "narrow"}, NONE: {"client": "none"},
    OLD: {"client": "other", "expires": 1000000000}, LATER: {"client": "other", "expires": 4000000000},
}  # fmt: skip
ROUTES = [
    route("small", [FIRST], aliases=["gpt-4o", "acme/gpt"], clients=["team-a", "other"]),
    route("acme/big", [SECOND], aliases=["big"]),
    route("big", [SECOND], clients=["narrow"]),
    route("secret", [SECOND], clients=["nobody"]),
    route("whisper", [SOUND], paths=[TRANSCRIPTIONS], aliases=["whisper-1"]),
]
FLEET = document(ROUTES, [FIRST, SECOND, SOUND], CLIENTS, KEYS)
# What a body may look like, and the gateway must not change.
TOOLS = {
    "tools": [{"function": {"parameters": {"required": [], "enum": [12345678901234567890, 1.0, 1e400, None, True]}}}]
}
DEEP = '{"model": "small", "schema": ' + '{"a": [' * 250 + "]}" * 250 + "}"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    directory: Path = tmp_path_factory.mktemp("gateway")
    with running(directory, FLEET, list(FLEET["backends"])) as gateway:
        yield gateway


@pytest.fixture(autouse=True)
def fresh() -> None:
    for backend in (FIRST, SECOND, SOUND):
        backend.reset()


def reached(backend: Backend) -> bytes:
    """The body of the one request that reached a backend."""
    (asked,) = backend.asked
    return asked.body


# --- the model


def test_the_model_chooses_the_route(gateway: Gateway) -> None:
    assert gateway.ask(CHAT, {"model": "small"}).json["backend"] == FIRST.id
    assert gateway.ask(CHAT, {"model": "acme/big"}).json["backend"] == SECOND.id
    (asked,) = FIRST.asked
    assert (asked.method, asked.path, asked.json) == ("POST", CHAT, {"model": "small"})
    assert asked.headers["authorization"] == f"Bearer {INTERNAL}"
    assert KEY not in str(asked)


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"small","messages":[],"n":12345678901234567890,"t":1.0,"x":{}}',
        b' \n{ "messages" : [ ] , "mod\\u0065l" : "sm\\u0061ll" , "seed" : -0 }\n',
        b'{"model":"nobody","model":"small"}',
        json.dumps({"model": "small", **TOOLS}).replace("Infinity", "1e400").encode(),
        DEEP.encode(),
        '{"model":"small","messages":[{"content":"é\\ud83d\\ude00"}]}'.encode(),
    ],
    ids=["numbers", "spaces and escapes", "twice", "tools", "deep", "text"],
)  # fmt: skip
def test_a_body_arrives_byte_for_byte(gateway: Gateway, body: bytes) -> None:
    assert gateway.ask(CHAT, body).status == 200
    assert reached(FIRST) == body


@pytest.mark.parametrize("size", [100, 100_000, 1_100_000, 5_000_000, (20 << 20) - 100])
@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
def test_long_bodies_arrive(gateway: Gateway, size: int, chunked: bool) -> None:
    body = b'{"messages":"' + b"x" * size + b'","model":"small"}'
    if chunked:
        connection = gateway.connection()
        headers = {"Authorization": f"Bearer {KEY}", "Transfer-Encoding": "chunked"}
        parts = (body[at : at + 65536] for at in range(0, len(body), 65536))
        connection.request("POST", CHAT, parts, headers, encode_chunked=True)
        response = connection.getresponse()
        assert (response.status, json.loads(response.read())["backend"]) == (200, FIRST.id)
    else:
        assert gateway.ask(CHAT, body).status == 200
    assert sha256(reached(FIRST)) == sha256(body)


def test_an_alias_becomes_the_served_name_and_nothing_else_changes(gateway: Gateway) -> None:
    body = b'{ "n": 1e2, "model" : "gpt-4o", "messages": [], "x": {"model": "gpt-4o"} }'
    assert gateway.ask(CHAT, body).json["model"] == "small"
    assert reached(FIRST) == body.replace(b'"model" : "gpt-4o"', b'"model" : "small"')
    assert FIRST.asked[0].headers["content-length"] == str(len(body) - 1)


def test_priority_is_taken_out(gateway: Gateway) -> None:
    body = b'{"priority": -100, "model": "small", "x": {"priority": 1}, "pri\\u006frity": -2, "messages": []}'
    assert gateway.ask(CHAT, body).status == 200
    assert json.loads(reached(FIRST)) == {"model": "small", "x": {"priority": 1}, "messages": []}


@pytest.mark.parametrize("name", ["nothing", "Small", "__proto__", "secret", "small ", "", "a`\n\"'\\"])
def test_an_unknown_model_and_a_forbidden_one_are_the_same(gateway: Gateway, name: str) -> None:
    answer = gateway.ask(CHAT, {"model": name})
    assert (answer.status, answer.error["code"], answer.error["param"]) == (404, "model_not_found", "model")
    assert answer.error["message"] == f"The model `{name}` does not exist or you do not have access to it."
    assert not FIRST.asked + SECOND.asked


def test_a_client_may_be_for_some_models_only(gateway: Gateway) -> None:
    assert gateway.ask(CHAT, {"model": "big"}, key=NARROW).status == 200
    assert gateway.ask(CHAT, {"model": "acme/big"}, key=NARROW).status == 404
    assert gateway.ask(CHAT, {"model": "small"}, key=NARROW).status == 404
    assert gateway.ask(CHAT, {"model": "small"}, key=OTHER).status == 200


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"), (b"[]", "invalid_json"), (b"{", "invalid_json"), (b'{"model":"small"} x', "invalid_json"),
        (b'{"model":"small","x":NaN}', "invalid_json"), (b'\xef\xbb\xbf{"model":"small"}', "invalid_json"),
        (b"{}", "missing_required_parameter"), (b'{"model":7}', "missing_required_parameter"),
        (b'{"model":null}', "missing_required_parameter"), (b'{"x":{"model":"small"}}', "missing_required_parameter"),
    ],
)  # fmt: skip
def test_a_body_without_a_model(gateway: Gateway, body: bytes, code: str) -> None:
    answer = gateway.ask(CHAT, body)
    assert (answer.status, answer.error["code"], answer.error["type"]) == (400, code, "invalid_request_error")
    assert not FIRST.asked


def form(model: str, boundary: str = "x-y") -> bytes:
    fields = f'--{boundary}\r\nContent-Disposition: form-data; name="model"\r\n\r\n{model}\r\n'
    sound = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n'
    return fields.encode() + sound.encode() + bytes(range(256)) * 8 + f"\r\n--{boundary}--\r\n".encode()


def test_a_form_has_its_model_too(gateway: Gateway) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=x-y"}
    assert gateway.ask(TRANSCRIPTIONS, form("whisper"), headers=headers).status == 200
    assert reached(SOUND) == form("whisper")
    assert SOUND.asked[0].path == TRANSCRIPTIONS
    assert gateway.ask(TRANSCRIPTIONS, form("small"), headers=headers).status == 404
    assert (
        gateway.ask(TRANSCRIPTIONS, form("x").replace(b'"model"', b'"other"'), headers=headers).error["code"]
        == "missing_required_parameter"
    )
    assert gateway.ask(TRANSCRIPTIONS, form("whisper")[:-9], headers=headers).error["code"] == "invalid_form"


def test_an_alias_in_a_form(gateway: Gateway) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=x-y"}
    assert gateway.ask(TRANSCRIPTIONS, form("whisper-1"), headers=headers).status == 200
    assert reached(SOUND) == form("whisper")
    assert SOUND.asked[0].headers["content-type"] == headers["Content-Type"]


# --- the path


def test_a_path_is_let_through_where_the_model_has_it(gateway: Gateway) -> None:
    assert gateway.ask("/v1/completions", {"model": "small"}).status == 200
    answer = gateway.ask(CHAT, {"model": "whisper"})
    assert (answer.status, answer.error["code"]) == (404, "not_served")
    assert not SOUND.asked


@pytest.mark.parametrize(
    "path",
    ["/", "/v1", "/metrics", "/v1/embeddings", "/invocations", "/v1/chat/completions/", "/_error/400", "/v1/modelsx"],
)
def test_everything_else_is_not(gateway: Gateway, path: str) -> None:
    for method in ("GET", "POST", "HEAD", "DELETE", "OPTIONS"):
        answer = gateway.ask(path, {"model": "small"}, method=method)
        assert answer.status == 404
        if method != "HEAD":
            assert answer.error["code"] == "not_found"
    assert not FIRST.asked


@pytest.mark.parametrize(
    "path",
    [
        "/v1/./chat/completions",
        "//v1/chat/completions",
        "/v1/%63hat/completions",
        "/metrics/../v1/chat/completions",
        CHAT + "?a=/metrics",
        CHAT + "#x",
    ],
)
def test_the_backend_sees_a_constant_path_and_no_query(gateway: Gateway, path: str) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: llm.test\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 17\r\nConnection: close\r\n\r\n"
    assert gateway.raw(head.encode() + b'{"model":"small"}').startswith(b"HTTP/1.1 200 ")
    assert FIRST.asked[0].path == CHAT


@pytest.mark.parametrize(
    ("path", "method", "allowed"),
    [
        *((CHAT, method, "POST") for method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH")),
        *(("/v1/models", method, "GET, HEAD") for method in ("POST", "DELETE")), ("/v1/models/small", "POST", "GET, HEAD"),
    ],
)  # fmt: skip
def test_a_wrong_method_is_told_the_right_one(gateway: Gateway, path: str, method: str, allowed: str) -> None:
    answer = gateway.ask(path, method=method)
    assert (answer.status, answer.headers["allow"]) == (405, allowed)
    if method != "HEAD":
        assert answer.error["code"] == "method_not_allowed"


def test_a_refused_body_is_not_taken_for_the_next_request(gateway: Gateway) -> None:
    """Whatever comes back, nobody is asked what stands in a body."""
    inner = (
        f"POST {CHAT} HTTP/1.1\r\nHost: llm.test\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 17\r\n\r\n".encode()
        + b'{"model":"small"}'
    )
    for path, key in (("/nowhere", KEY), (CHAT, "wrong"), ("/v1/models", KEY), ("/healthz", KEY)):
        for method in ("POST", "GET"):
            head = f"{method} {path} HTTP/1.1\r\nHost: llm.test\r\nAuthorization: Bearer {key}\r\nContent-Length: {len(inner)}\r\n\r\n"
            with gateway.connect() as connection:
                connection.sendall(head.encode())
                connection.settimeout(1)
                connection.recv(65536)
                try:
                    connection.sendall(inner)
                    connection.recv(65536)
                except OSError:
                    pass
    time.sleep(0.2)
    assert not FIRST.asked


# --- the models


def test_the_models_are_those_of_the_client(gateway: Gateway) -> None:
    for path in ("/v1/models", "/v1/models/", "/v1/models?x=y"):
        answer = gateway.ask(path)
        assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
        assert answer.json["object"] == "list"
        assert [one["id"] for one in answer.json["data"]] == ["small", "acme/big", "whisper"]
        assert set(answer.json["data"][0]) == {"id", "object", "created", "owned_by"}
    assert [one["id"] for one in gateway.ask("/v1/models", key=NARROW).json["data"]] == ["big"]
    assert gateway.ask("/v1/models", key=NONE).json["data"] == []
    assert not FIRST.asked


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("small", "small"),
        ("small/", "small"),
        ("acme/big", "acme/big"),
        ("acme%2Fbig", "acme/big"),
        ("gpt-4o", "small"),
        ("big/", "acme/big"),
    ],
)
def test_one_model_is_told(gateway: Gateway, path: str, name: str) -> None:
    answer = gateway.ask(f"/v1/models/{path}")
    assert (answer.status, answer.json["id"], answer.json["object"]) == (200, name, "model")


def test_a_model_that_is_not_the_clients_is_not_told(gateway: Gateway) -> None:
    for name in ("secret", "nothing", "small/x"):
        assert gateway.ask(f"/v1/models/{name}").error["code"] == "model_not_found"
    assert gateway.ask("/v1/models/small", key=NARROW).status == 404


def test_head_is_get_without_a_body(gateway: Gateway) -> None:
    for path in ("/v1/models", "/v1/models/small"):
        answer = gateway.ask(path, method="HEAD")
        assert (answer.status, answer.body) == (200, b"")


# --- the key


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {KEY}"}, {"Authorization": f"bearer {KEY}"}, {"Authorization": f"BEARER {KEY}"},
        {"x-api-key": KEY}, {"api-key": KEY}, {"Authorization": "Basic eDp5", "X-Api-Key": KEY}, {"Authorization": f"Bearer {LATER}"},
    ],
)  # fmt: skip
def test_a_key_is_taken_from_where_libraries_put_it(gateway: Gateway, headers: dict[str, str]) -> None:
    assert gateway.ask(CHAT, {"model": "small"}, key=None, headers=headers).status == 200
    (asked,) = FIRST.asked
    assert asked.headers["authorization"] == f"Bearer {INTERNAL}"
    assert not {"x-api-key", "api-key"} & set(asked.headers)


@pytest.mark.parametrize(
    "authorization",
    [
        None, "", KEY, f"Bearer {KEY.upper()}", f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Bearer  {KEY}",
        f"Bearer {KEY},", f"Bearer {KEY} {KEY}", "Bearer", "Bearer .*", f"Bearer {INTERNAL}", f"Bearer {OLD}", f"Bearer {sha256(KEY)}",
    ],
)  # fmt: skip
def test_everything_else_is_no_key(gateway: Gateway, authorization: str | None) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    for path, body in ((CHAT, {"model": "small"}), ("/v1/models", None)):
        answer = gateway.ask(path, body, key=None, headers=headers)
        assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert not FIRST.asked


def test_a_key_is_revoked_by_a_reload_and_running_streams_go_on(gateway: Gateway) -> None:
    FIRST.answer = lambda handler, _asked: handler.stream(tokens(10, 0.1))
    connection = gateway.connection()
    connection.request("POST", CHAT, json.dumps({"model": "small"}), {"Authorization": f"Bearer {OTHER}"})
    response = connection.getresponse()
    assert response.read(6) == b"data: "
    try:
        gateway.configure(document(ROUTES, [FIRST, SECOND, SOUND], CLIENTS, {KEY: {"client": "team-a"}}))
        assert gateway.ask("/v1/models", key=OTHER).status == 401
        assert gateway.ask("/v1/models").status == 200
        assert b"[DONE]" in response.read()
    finally:
        gateway.configure(FLEET)


# --- what goes along


def test_what_a_client_says_about_itself_stays_outside(gateway: Gateway) -> None:
    lies = {
        "X-Forwarded-For": "192.0.2.99", "X-Real-IP": "192.0.2.99", "Forwarded": "for=192.0.2.99", "X-Request-Id": "192.0.2.99",
        "X-Forwarded-Host": "192.0.2.99", "X-Forwarded-Port": "19202", "Cookie": "a=192.0.2.99", "X-Data-Parallel-Rank": "0",
        "X_Forwarded_For": "192.0.2.99", "X-Forwarded-Proto": "19202",
    }  # fmt: skip
    answer = gateway.ask(CHAT, {"model": "small"}, headers=lies)
    headers = FIRST.asked[0].headers
    assert "192.0.2.99" not in str(headers)
    assert "19202" not in str(headers)
    assert headers["x-request-id"] == answer.headers["x-request-id"]
    assert (headers["host"], headers["x-forwarded-for"], headers["x-forwarded-proto"]) == ("vllm", "127.0.0.1", "https")
    assert "x-data-parallel-rank" not in headers


def test_the_log_says_who_asked_whom_and_no_secret(gateway: Gateway) -> None:
    request = gateway.ask(f"{CHAT}?secret-argument", {"model": "gpt-4o", "messages": "secret-argument"}).headers[
        "x-request-id"
    ]
    line = gateway.logged(request)
    told = {name: line[name] for name in ("client", "model", "route", "backend", "uri", "status", "method")}
    assert told == {
        "client": "team-a", "model": "small", "route": "chat", "backend": FIRST.id, "uri": CHAT, "status": "200", "method": "POST"
    }  # fmt: skip
    assert line["upstream_addr"] == f"127.0.0.1:{FIRST.port}"
    every = "".join(path.read_text() for path in (gateway.directory / "var/log/nginx").iterdir())
    for secret in (KEY, INTERNAL, OTHER, "secret-argument"):
        assert secret not in every
