"""What no client writes: paths, methods, headers and bodies, by the thousand. What reached a backend is what the backend says."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.backends import Asked, Handler
from tests.gateway.harness import CHAT, KEY, NAME, Gateway, document, route, running
from tests.gateway.wire import BODY, REFUSALS, Witness, answers, judge_logs, request

SECRET_PATHS = (
    "/metrics",
    "/v1/load_lora_adapter",
    "/sleep",
    "/invocations",
    "/in_flight",
    "/_error/400",
    "/server_info",
)
ODD = 'we"ird\\na/me\n模型'
BACKEND = Witness("chat@gpu-1")


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    directory: Path = tmp_path_factory.mktemp("fuzz")
    routes = [
        route("small", [BACKEND], aliases=["gpt-4o", "x\r\nInjected: yes"]),
        route(ODD, [BACKEND], aliases=["odd"]),
        route("kept", [BACKEND], balance="session", session_header="x-session-id"),
    ]
    with running(directory, document(routes, [BACKEND]), [BACKEND.id]) as gateway:
        yield gateway
        judge_logs(gateway)


@pytest.fixture(autouse=True)
def nothing_else_arrives() -> Iterator[None]:
    BACKEND.reached.clear()
    BACKEND.answer = BACKEND.keep
    yield
    BACKEND.judge(["small", ODD, "kept"])


def refused(gateway: Gateway, data: bytes) -> list[int]:
    """Send what must not get through; returns the statuses. An empty list: the connection was closed without an answer."""
    statuses = answers(gateway.raw(data))
    assert set(statuses) <= REFUSALS, (data[:300], statuses)
    assert BACKEND.reached == [], (data[:300], statuses)
    return statuses


# Paths and methods ----------------------------------------------------------------------------------------------------------------------------------


def mutations(random_: random.Random) -> Iterator[bytes]:
    """Targets near one that is served, and near those that must not be."""
    pieces = [b"/", b"//", b"/./", b"/../", b"%2f", b"%2F", b"%5c", b"\\", b"%00", b"%0d%0a", b"%20", b"%", b"%zz", b"%ff", b"%c0%af", b";", b";a=b",
              b"?", b"?a=b", b"#", b"*", b".", b"..", b"%2e", b"%2e%2e", b"%252e", b"@", b":80", b"\x80", b"\xff", b"~", b"{", b'"',
              b"'"]  # fmt: skip
    bases = [CHAT.encode(), b"/v1/completions", b"/v1/models", b"/healthz", *(path.encode() for path in SECRET_PATHS)]
    while True:
        target = bytearray(random_.choice(bases))
        for _ in range(random_.randint(1, 3)):
            at = random_.randrange(len(target) + 1)
            change = random_.randrange(4)
            if change == 0:
                target[at:at] = random_.choice(pieces)
            elif change == 1:
                target[at : at + 1] = b"%%%02x" % target[at] if at < len(target) else b"/"
            elif change == 2:
                target = bytearray(bytes(target[:at]) + bytes(target[at:]).swapcase())
            else:
                target[at : at + random_.randint(1, 4)] = b""
        form = random_.randrange(8)
        prefix = {0: b"http://llm.test", 1: b"https://other.test", 2: b"//llm.test"}.get(form, b"")
        yield prefix + bytes(target)


def test_paths_near_those_that_are_served(gateway: Gateway) -> None:
    """Some of them are another way to write a path that is served (`/v1/./chat/completions`); the backend sees its constant path then."""
    made = mutations(random.Random(16))
    seen = set()
    for _ in range(600):
        data = request(next(made))
        statuses = answers(gateway.raw(data))
        assert set(statuses) <= {200, *REFUSALS}, (data, statuses)
        seen |= set(statuses)
    assert {200, 400, 404} <= seen  # it tried both what is served and what is not


@pytest.mark.parametrize("path", SECRET_PATHS)
def test_paths_that_are_not_served(gateway: Gateway, path: str) -> None:
    for written in (path, f"/v1/chat/completions/..{path}", f"/v1/chat/completions/%2e%2e/%2e%2e/..{path}", f"http://{NAME}{path}", path + "?x",
                    f"{path};/v1/chat/completions", f"{path}%00/v1/chat/completions", f"{path}#/v1/chat/completions", "/" + path):  # fmt: skip
        for method in (b"GET", b"POST"):
            refused(gateway, request(written.encode(), method, body=BODY if method == b"POST" else b""))


@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"TRACE", b"CONNECT", b"PROPFIND", b"post", b"PoST",
                                    b"POST\t", b"P\0ST", b"X" * 100, b"PRI", b"-", b"M-SEARCH", b"LOCK"])  # fmt: skip
def test_methods(gateway: Gateway, method: bytes) -> None:
    head = gateway.raw(request(method=method)).split(b"\r\n")[0]
    assert not head or int(head.split()[1]) in REFUSALS, head
    assert BACKEND.reached == []


# Headers --------------------------------------------------------------------------------------------------------------------------------------------


def test_what_a_client_says_of_itself_stays_outside(gateway: Gateway) -> None:
    """The fixture looks at what arrives; here it is that all of these get as far as a 200."""
    names = ("Cookie", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Port", "X-Forwarded-Proto", "X-Forwarded-Prefix", "Forwarded", "X-Real-IP", "Via",
             "X-Data-Parallel-Rank", "x-data-parallel-rank", "X-Request-Id", "X-Correlation-Id", "Proxy-Authorization", "X-Original-URL",
             "X-Rewrite-URL",
             "X-Accel-Redirect", "X-HTTP-Method-Override", "endpoint-load-metrics-format", "X-Session-Id", "traceparent", "tracestate", "baggage",
             "Upgrade",
             "Accept-Encoding", "Range", "If-None-Match", "If-Modified-Since", "Keep-Alive", "TE", "Trailer", "Origin", "Referer", "User-Agent",
             "OpenAI-Organization", "anthropic-version", "Content-Encoding", "Content-Location", "Max-Forwards", "X-Api-Key", "Api-Key",
             "X_Under_Score",
             "SageMaker-Session", "X-Amzn-Sagemaker-Session-Id", "Cache-Control")  # fmt: skip
    headers = b"".join(f"{name}: {KEY}\r\n".encode() for name in names)
    assert answers(gateway.raw(request(headers=headers))) == [200]
    (reached,) = BACKEND.reached
    assert reached.header["x-forwarded-for"] == "127.0.0.1"


@pytest.mark.parametrize("header", [
    b"Authorization: Bearer wrong\r\n", b"Host: other.test\r\n", b"Content-Length: 3\r\n", b"Content-Type: a/b\r\nContent-Type: c/d\r\n",
    b"X\x00Y: 1\r\n", b"X: a\x00b\r\n", b" X: folded\r\n", b"X: a\r\n folded: b\r\n", b"no colon\r\n", b": empty\r\n", b"X : space\r\n",
    b"X: " + b"y" * 70000 + b"\r\n",
    b"".join(b"X-%d: 1\r\n" % number for number in range(5000)), b"X: a\rY: b\r\n", b"X: a\nY: b\r\n", b"Transfer-Encoding: chunked\r\n",
    b"Connection: Authorization\r\n",
    b"Connection: upgrade\r\nUpgrade: websocket\r\n", b"Connection: upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n",
    b"Expect: 100-continue\r\n", b"Expect: nonsense\r\n", b"\xff\xfe: 1\r\n", b"X: \xff\xfe\r\n", b"Content-Encoding: gzip\r\n",
    b"Range: bytes=0-1\r\n",
], ids=lambda header: repr(header[:40]))  # fmt: skip
def test_headers(gateway: Gateway, header: bytes) -> None:
    data = gateway.raw(request(headers=header))
    data = data.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert set(answers(data)) <= {200, *REFUSALS}
    assert len(BACKEND.reached) <= 1


@pytest.mark.parametrize(
    "key",
    [
        "",
        " ",
        "a" * 16,
        "x" * 15000,
        KEY + " ",
        KEY.upper(),
        KEY[:-1],
        "null",
        "undefined",
        "__index",
        "' or 1=1",
        "\t" + KEY,
    ],
)
def test_keys(gateway: Gateway, key: str) -> None:
    for name in (b"Authorization: Bearer", b"Authorization: Basic", b"X-Api-Key:", b"Api-Key:", b"Authorization:"):
        data = b"POST %s HTTP/1.1\r\nHost: %s\r\n%s %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (
            CHAT.encode(), NAME.encode(), name, key.encode(), len(BODY), BODY,
        )  # fmt: skip
        if key.strip() == KEY and b"Basic" not in name and name != b"Authorization:":
            continue  # spaces around a value are none of it
        assert refused(gateway, data) in ([401], [400])


# Bodies ---------------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [
    "", " ", "\0", "small\0", "small\n", "\r\nX-Injected: yes", "x" * 1_000_000, "\ud800", "\udfff\ud800", "\x1b[31m", "模" * 100, "é" * 199,
    "Small", "small ", "__index", "__proto__",
    "constructor", "../small", "small/../../metrics", '"', "\\", "$uri", "${gateway_path}", "%s%n", "{{7*7}}", "<script>", "🦙" * 70,
], ids=lambda name: ascii(name[:20]))  # fmt: skip
def test_names_of_no_model(gateway: Gateway, name: str) -> None:
    """The answer names it, and is JSON in UTF-8 all the same."""
    for body in (json.dumps({"model": name}), json.dumps({"model": name}, ensure_ascii=False)):
        got = gateway.ask(CHAT, body.encode("utf-8", "surrogatepass"))
        assert got.status == 404
        assert got.error["code"] == "model_not_found"
        assert len(got.body) < 2000
        assert "x-injected" not in got.headers
    assert BACKEND.reached == []


@pytest.mark.parametrize("host", [b"\xff", NAME.encode() + b"\xc3"])
def test_a_host_that_is_no_text_gets_nothing(gateway: Gateway, host: bytes) -> None:
    """And its line in the log can be read, as judge_logs() sees."""
    assert gateway.raw(b"GET /v1/models HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n") == b""


@pytest.mark.parametrize("name", [b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"a" * 199 + b"\xc3\xa9", b"\xf0\x9f\xa6"])
def test_names_that_are_no_text(gateway: Gateway, name: bytes) -> None:
    assert gateway.ask(CHAT, b'{"model": "%s"}' % name).error
    assert gateway.ask("/v1/models/" + "".join(f"%{byte:02x}" for byte in name)).error["code"] == "model_not_found"
    assert BACKEND.reached == []


@pytest.mark.parametrize("body", [
    b"", b" ", b"null", b"[]", b'"small"', b"{", b'{"model"', b'{"model":', b'{"model": "small"', b'{"model": "small"}}',
    b'{"model": "small"} {"model": "small"}', b'{"model": small}',
    b'{"model": null}', b'{"model": ["small"]}', b'{"model": {"model": "small"}}', b'{"a": {"model": "small"}}',
    b'{"a": "\\"model\\": \\"small\\""}', b"{'model': 'small'}",
    b'{"model": "small",}', b'{"model": "small", "x": NaN}', b'{"model": "small", "x": 01}', b'{"model": "small" "x": 1}', b'{"Model": "small"}',
    b'{"model ": "small"}',
    b'\xef\xbb\xbf{"model": "small"}', b'{"model": "sma\nll"}', b'{"model": "\\u00"}', b'{"model": "\\x"}', b"\x1f\x8b\x08\x00", b"model=small",
    b'{"x": ' + b"[" * 100000 + b"]" * 100000 + b"}",
    b'{"model": "small", "model": 7}', b'{"model": "small", "mod\\u0065l": "none"}', json.dumps({"model": "small"}).encode("utf-16"),
], ids=lambda body: repr(body[:40]))  # fmt: skip
def test_bodies_that_name_no_model(gateway: Gateway, body: bytes) -> None:
    got = gateway.ask(CHAT, body, method="POST")
    assert got.status in (400, 404), got
    assert got.error
    assert BACKEND.reached == []


@pytest.mark.parametrize("body", [
    b'{"model": "none", "model": "small"}', b'{"mod\\u0065l": "small"}', b'{"model": "sm\\u0061ll"}', b'{"model":"gpt-4o","model":"gpt-4o"}',
    b' \r\n\t{ "model" : "gpt-4o" } \r\n',
    b'{"model": "none", "mod\\u0065l": "gpt-4o", "\\u006dodel": "gpt-4o"}', b'{"x": "\\ud800", "model": "gpt-4o"}',
    b'{"": 1, "\\u0000": 2, "\\"": 3, "model": "gpt-4o"}',
    b'{"model": "x\\r\\nInjected: yes"}', b'{"priority": -5, "model": "gpt-4o", "prior\\u0069ty": 1}',
    b'{"model": "gpt-4o", "priority": {"a": [1, "}"]}}',
    b'{"big": 123456789012345678901234567890, "float": 1e-400, "empty": [], "object": {}, "model": "gpt-4o"}',
], ids=lambda body: repr(body[:40]))  # fmt: skip
def test_bodies_that_name_one(gateway: Gateway, body: bytes) -> None:
    """Nothing but the name of the model is another one than the client wrote, and its priority is gone."""
    assert gateway.ask(CHAT, body).status == 200
    (reached,) = BACKEND.reached
    wanted = {name: value for name, value in json.loads(body).items() if name != "priority"} | {"model": "small"}
    assert json.loads(reached.body) == wanted


def test_names_with_odd_characters_are_served(gateway: Gateway) -> None:
    assert gateway.ask(CHAT, {"model": "odd"}).status == 200
    assert gateway.ask(CHAT, {"model": ODD}).status == 200
    assert [json.loads(reached.body)["model"] for reached in BACKEND.reached] == [ODD, ODD]


@pytest.mark.parametrize("header", [b"", b"X-Session-Id: \r\n", b"X-Session-Id: a\r\nX-Session-Id: b\r\n", b"X-Session-Id: " + b"a" * 15000 + b"\r\n",
                                    b"X-Session-Id: \xff\xfe%00\r\n", b"".join(b"X-%d: 1\r\n" % number for number in range(150)) + b"X-Session-Id: a\r\n"],
                         ids=lambda header: repr(header[:30]))  # fmt: skip
def test_sessions(gateway: Gateway, header: bytes) -> None:
    """Whatever names one, the request is answered, and the name stays here."""
    values: list[Any] = ["", "a", "\0\r\n", "\ud800", 7, None, [], {"a": 1}, "x" * 100_000]
    for value in values:
        for name in ("user", "prompt_cache_key", "messages"):
            body = json.dumps({"model": "kept", name: value}).encode()
            assert answers(gateway.raw(request(headers=header, body=body))) == [200]
    assert len(BACKEND.reached) == 27


def test_names_of_megabytes(gateway: Gateway) -> None:
    """To decode so many escapes would hold up everybody for seconds."""
    long = b"\\u0041" * 1_500_000
    begun = time.monotonic()
    assert gateway.ask(CHAT, b'{"model": "' + long + b'"}').error["code"] == "model_not_found"
    assert gateway.ask(CHAT, b'{"model": "kept", "user": "' + long + b'"}').status == 200
    assert gateway.ask("/v1/models/" + "x" * 15000).error["code"] == "model_not_found"
    assert time.monotonic() - begun < 2.5


def any_value(random_: random.Random, depth: int) -> Any:
    """Some JSON."""
    texts = ["", "model", "small", 'q"uo\\te', "\0\x1f\x7f", "é模🦙", "\ud800", "priority", "}", "]", ",", "x" * 300]
    simple = [None, True, False, 0, -1, 2**70, 1.5e300, *texts]
    kind = random_.randrange(3 if depth < 5 else 1)
    if kind == 1:
        return [any_value(random_, depth + 1) for _ in range(random_.randrange(4))]
    if kind == 2:
        return {random_.choice(texts): any_value(random_, depth + 1) for _ in range(random_.randrange(5))}
    return random_.choice(simple)


def test_any_body_is_passed_on_as_it_is(gateway: Gateway) -> None:
    random_ = random.Random(16)
    for _ in range(300):
        members = [(f"x{number}", any_value(random_, 0)) for number in range(random_.randrange(6))]
        members.insert(random_.randrange(len(members) + 1), ("model", random_.choice(["small", "gpt-4o"])))
        if random_.random() < 0.3:
            members.insert(random_.randrange(len(members) + 1), ("priority", any_value(random_, 3)))
        body = json.dumps(dict(members), ensure_ascii=random_.random() < 0.5, indent=random_.choice([None, None, 1]))
        if random_.random() < 0.2:
            cut = random_.randrange(len(body))
            body = body[:cut] + random_.choice(["", "{", "}", '"', ",", "\\", "\0"]) + body[cut + 1 :]
        got = gateway.ask(CHAT, body.encode("utf-8", "surrogatepass"))
        assert got.status in (200, 400, 404), (body, got)
        if got.status == 200:
            sent = json.loads(body.encode("utf-8", "surrogatepass").decode("utf-8", "surrogatepass"))
            wanted = {name: value for name, value in sent.items() if name != "priority"} | {"model": "small"}
            assert json.loads(BACKEND.reached[-1].body.decode("utf-8", "surrogatepass")) == wanted
    assert len(BACKEND.reached) > 200


# Answers --------------------------------------------------------------------------------------------------------------------------------------------


def test_an_answer_cannot_command_the_gateway(gateway: Gateway) -> None:
    """What Nginx obeys in the header of an answer, a backend has no business with."""

    def commanding(handler: Handler, _asked: Asked) -> None:
        headers = {"X_Accel_Redirect": "/healthz", "X_Accel_Buffering": "yes", "X_Accel_Limit_Rate": "1"}
        handler.reply(200, b'{"from": "the backend"}', **headers)

    BACKEND.answer = commanding
    got = gateway.ask(CHAT, {"model": "small"})
    assert (got.status, got.json) == (200, {"from": "the backend"})
