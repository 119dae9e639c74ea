"""The life of the server: it starts an engine, listens, answers, drains when it is told to stop, and ends when its engine dies."""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from .. import __version__
from . import api, kinds, tls
from .configuration import Served
from .http import Request, Response, Stream, head, read
from .metrics import Metrics
from .settings import Settings

# As the real one's, a process of its own with this name, whose death ends the server. It lives as long as its input is open.
ENGINE = "VLLM::EngineCore"
ENGINE_PROGRAM = f"import sys; open('/proc/self/comm', 'w').write('{ENGINE}'); sys.stdin.read()"
ROUTES = {"/health": "GET", "/ping": "GET, POST", "/version": "GET", "/metrics": "GET", "/v1/models": "GET"}


class EngineDeadError(Exception):
    """The process that makes the tokens is gone."""


class Asked:
    """A request on its way through middleware, which may answer it itself."""

    def __init__(self, request: Request, writer: asyncio.StreamWriter) -> None:
        self.request, self.writer = request, writer
        self.status = 0

    async def by(self, application: Any) -> int:
        """Have it answered. Returns the status; 0 when the connection is to be closed without an answer."""
        path, _, query = self.request.path.partition("?")
        headers = [(name.encode(), value.encode("latin-1")) for name, value in self.request.headers.items()]
        await application(
            {
                "type": "http", "method": self.request.method, "path": path, "query_string": query.encode(), "root_path": "",
                "headers": headers, "asked": self,
            },
            None, self.send,
        )  # fmt: skip
        return self.status

    async def send(self, message: dict[str, Any]) -> None:
        """Send what middleware answers."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.writer.write(head(self.status, {name.decode(): value.decode() for name, value in message["headers"]}))
        else:
            self.writer.write(message["body"])
            await self.writer.drain()


class Server:
    """One vLLM."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.key = os.environ.get("VLLM_API_KEY", "")
        # As FastAPI has it: the one that is named last is asked first.
        self.application: Any = self.endpoint
        for name in served.options.get("middleware") or []:
            module, _, attribute = name.rpartition(".")
            self.application = getattr(importlib.import_module(module), attribute)(self.application)
        self.metrics = Metrics(served.names[0])
        self.routes = {**ROUTES, **dict.fromkeys(kinds.ROUTES[served.kind], "POST")}
        self.running = 0
        # Who waits for the prompt of another, and whose prompt is computed.
        self.waiting = 0
        self.prefilling = asyncio.Lock()
        self.draining = False
        # Connections on which nobody asks anything: when it listens no more, these end, and others after their answer, as uvicorn has it.
        self.quiet: set[asyncio.StreamWriter] = set()
        self.listens = True
        self.gave_up = False  # longer than the time for running requests: no token follows, and nobody is told
        self.idle = asyncio.Event()
        self.engine_died = asyncio.Event()
        self.refreshing: asyncio.Task[None] | None = None

    async def token(self, settings: Settings, moment: float) -> None:
        """Wait until the moment when a token is there. Raises EngineDeadError when none can come any more."""
        left = moment - asyncio.get_running_loop().time()
        if settings.answers != "hang":
            self.step()
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.engine_died.wait(), max(left, 0.0001))
        if self.engine_died.is_set():
            raise EngineDeadError
        if settings.answers == "hang" or self.gave_up:
            await self.engine_died.wait()
            raise EngineDeadError
        self.metrics.counted["iterations"] += 1

    def step(self) -> None:
        """What the engine tells after a step."""
        self.metrics.running, self.metrics.waiting = self.running - self.waiting, self.waiting

    async def prefill(self, settings: Settings) -> None:
        """Compute a prompt, in chunks as vLLM does: while it is a long one, nobody else's turn comes, and no step makes a token."""
        self.waiting += 1
        async with self.prefilling:
            self.waiting -= 1
            chunks = 64 if settings.prefill_seconds and settings.answers != "hang" else 0
            for chunk in range(chunks):
                self.step()
                self.metrics.kv = (chunk + 1) / chunks
                await asyncio.sleep(settings.prefill_seconds / chunks)
            self.metrics.kv = 0.0

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of a connection one after the other."""
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while self.listens:
                self.quiet.add(writer)
                request = await read(reader)
                self.quiet.discard(writer)
                if not request:
                    break
                peer = writer.get_extra_info("peername") or ("", 0)
                status = await Asked(request, writer).by(self.application)
                print(
                    f'INFO:     {peer[0]}:{peer[1]} - "{request.method} {request.path} HTTP/1.1" {status}', flush=True
                )
                if not status or request.headers.get("connection", "").lower() == "close":
                    break
        self.quiet.discard(writer)
        writer.close()

    async def endpoint(self, scope: dict[str, Any], _receive: object, _send: object) -> None:
        """What middleware is around, for ASGI; it answers as it always did."""
        asked: Asked = scope["asked"]
        asked.status = await self.answer(asked.request, asked.writer)

    async def answer(self, request: Request, writer: asyncio.StreamWriter) -> int:
        """Answer a request. Returns the status; 0 when the connection is to be closed without an answer."""
        path = request.path.split("?")[0]
        allowed = self.routes.get(path)
        headers = {}
        if self.served.request_ids and "x-request-id" in request.headers:
            headers["x-request-id"] = request.headers["x-request-id"]
        response: Response | None
        if echoed := self.echo(request):
            response = echoed
        elif path.startswith("/v1") and self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            response = api.UNAUTHORIZED
        elif allowed is None:
            response = api.NOT_FOUND
        elif request.method not in allowed.split(", "):
            response = api.NOT_ALLOWED
        elif request.method == "POST" and path != "/ping":
            self.running += 1
            try:
                response = await self.generate(path, request, writer, headers)
            except EngineDeadError:
                response = api.ENGINE_DEAD
            finally:
                self.running -= 1
                self.idle.set()
            if response is None or response.status == 200:
                self.step()
            if response is None:
                return 200
        else:
            response = self.look(path)
        if not response.status:
            return 0
        told = {"content-length": str(len(response.content)), "content-type": response.kind, **headers}
        writer.write(head(response.status, told) + response.content)
        await writer.drain()
        return response.status

    def echo(self, request: Request) -> Response | None:
        """What came, when that was commanded: for tests of what is in front of vLLM."""
        try:
            settings = Settings.current(request.json() if request.body[:1] == b"{" else None)
        except ValueError:
            settings = Settings.current()
        if settings.answers != "echo":
            return None
        told = {"backend": settings.version, "method": request.method, "path": request.path, "headers": request.headers}
        # also what a check takes for an answer
        content = {"choices": [{"text": "Hi", "message": {"content": "Hi"}}]}
        return Response.of(200, {**told, "size": len(request.body), **content})

    def look(self, path: str) -> Response:
        """What needs no engine."""
        if path in ("/health", "/ping"):
            return Response(200, b"", "text/plain")
        if path == "/version":
            return Response.of(200, {"version": Settings.current().version or __version__})
        if path == "/metrics":
            return Response(200, self.metrics.text().encode(), "text/plain; version=0.0.4; charset=utf-8")
        return Response.of(200, api.models(self.served))

    async def generate(
        self, path: str, request: Request, writer: asyncio.StreamWriter, headers: dict[str, str]
    ) -> Response | None:
        """What needs the engine; None when the answer was streamed."""
        try:
            body = kinds.form(request) if "/audio/" in path else request.json()
            settings = Settings.current(body)
            model = str(body.get("model") or self.served.names[0])
            if model not in self.served.names:
                return api.unknown_model(model, self.served)
            if self.draining:
                return api.STOPPING
            if misbehaved := self.misbehave(settings):
                return misbehaved
            await self.prefill(settings)
            begun = asyncio.get_running_loop().time()
            if self.served.kind != "generate":
                answer = kinds.answer(path, model, body, self.served, settings.answers == "nonsense")
                await self.token(settings, begun + settings.seconds_per_token)
                self.metrics.counted["requests"] += 1
                self.metrics.counted["prompt"] += 1
                return Response.of(200, answer)
            nonsense = settings.answers == "nonsense"
            completion = api.Completion(self.served, path, body, f"vllm-{settings.version or __version__}", nonsense)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            return api.error(400, str(error), "BadRequestError")
        if settings.answers != "hang":  # the engine counts a prompt with its first token
            self.metrics.counted["prompt"] += completion.prompt_tokens
        if completion.streams:
            await self.stream(completion, settings, Stream(writer, headers))
            return None
        for number in range(completion.tokens):
            await self.token(settings, begun + settings.seconds_per_token * (number + 1))
        self.count(completion.tokens)
        return Response.of(200, completion.whole())

    def misbehave(self, settings: Settings) -> Response | None:
        """What was commanded instead of an answer."""
        if settings.answers.isdigit():
            return api.error(int(settings.answers), "commanded by a test", "from_vllm")
        if settings.answers == "wrong":
            return Response.of(200, {"object": "text_completion", "choices": []})
        if settings.answers == "drop":
            return Response(0, b"")
        return None

    async def stream(self, completion: api.Completion, settings: Settings, stream: Stream) -> None:
        """Send the tokens as they come."""
        begun = asyncio.get_running_loop().time()
        try:
            if completion.chat:
                await stream.event(completion.role())
            for number in range(completion.tokens):
                # by the clock: what sending takes does not add up
                await self.token(settings, begun + settings.seconds_per_token * (number + 1))
                await stream.event(completion.piece(number))
            if completion.usage_at_end:
                await stream.event(completion.account())
            self.count(completion.tokens)
        except EngineDeadError:
            await stream.event(api.ENGINE_DEAD.content.decode())
        await stream.end()

    def count(self, tokens: int) -> None:
        """A request was answered."""
        self.metrics.counted["generated"] += tokens
        self.metrics.counted["requests"] += 1

    async def drain(self) -> None:
        """Let running requests end, for as long as they may."""
        self.draining = True
        limit = asyncio.get_running_loop().time() + self.served.shutdown_timeout
        while self.running and (left := limit - asyncio.get_running_loop().time()) > 0:
            self.idle.clear()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.idle.wait(), left)

    async def run(self) -> int:
        """Serve until SIGTERM or until the engine dies."""
        engine = await asyncio.create_subprocess_exec(
            ENGINE, "-I", "-c", ENGINE_PROGRAM, executable=sys.executable, stdin=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONHOME": sys.base_prefix},
        )  # fmt: skip
        secured = tls.context(self.served.options)
        listener = await asyncio.start_server(
            self.connection, self.served.host, self.served.port, backlog=2048, ssl=secured
        )
        if secured and self.served.options.get("enable-ssl-refresh"):
            self.refreshing = asyncio.create_task(tls.refresh(secured, self.served.options))
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        if dies_after := Settings.current().dies_after:
            loop.call_later(dies_after, engine.kill)
        for path, methods in self.routes.items():
            print(f"(APIServer pid={os.getpid()}) INFO [launcher.py] Route: {path}, Methods: {methods}")
        print(f"(APIServer pid={os.getpid()}) INFO:     Application startup complete.", flush=True)
        died, stopped = asyncio.create_task(engine.wait()), asyncio.create_task(stop.wait())
        await asyncio.wait([died, stopped], return_when=asyncio.FIRST_COMPLETED)
        if died.done():
            print(f"(APIServer pid={os.getpid()}) ERROR EngineDeadError: {ENGINE} died", file=sys.stderr, flush=True)
            self.engine_died.set()
            await asyncio.sleep(0.3)  # who waits is told
            listener.close()
            return 0  # as the real one
        await self.drain()
        self.gave_up = bool(self.running)
        self.listens = False
        listener.close()
        for writer in list(self.quiet):
            writer.close()
        if engine.returncode is None and engine.stdin:
            engine.stdin.close()
        await died
        while self.running:  # the real one waits for connections that nobody answers any more, until it is killed
            self.idle.clear()
            await self.idle.wait()
        return 0


def serve(served: Served) -> int:
    """Serve until the end. Returns the exit status."""
    shown: dict[str, Any] = {name: value for name, value in served.options.items() if name != "api-key"}
    print(f"(APIServer pid={os.getpid()}) INFO [utils.py] non-default args: {shown}", flush=True)
    if cache := os.environ.get("VLLM_CACHE_ROOT"):
        Path(cache).mkdir(parents=True, exist_ok=True)  # the real one keeps what it compiled there
    return asyncio.run(Server(served).run())
