"""The clients, and what they saw."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import ssl
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

from tests.load.answers import CHAT, COMPLETIONS, Question, Reading, WrongError, check_status, check_whole
from tests.load.connection import BrokenError, Connection

SHOWN = 20  # failures in a report
CAME = 300  # bytes of what came, in a report
TICK = 0.05


@dataclass(frozen=True)
class Gateway:
    """Where requests go. `tls` is none for plain HTTP."""

    name: str
    address: str
    port: int = 443
    tls: ssl.SSLContext | None = None
    # What its certificate has to be for; by default the address.
    server: str = ""

    @classmethod
    def of(cls, url: str, ca_file: str = "", insecure: bool = False) -> Gateway:
        """By its address in a browser."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url} is no address such as https://10.0.0.5")
        tls = None
        if parts.scheme == "https":
            tls = ssl.create_default_context(cafile=ca_file or None)
            if insecure:
                tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
        return cls(parts.netloc, parts.hostname, parts.port or (443 if tls else 80), tls)


@dataclass
class Outcome:
    """What became of one request. Moments are the seconds of time.time(), the others are lengths."""

    number: int
    gateway: str
    question: Question
    begun: float
    status: int = 0
    id: str = ""  # by which the gateway's log calls it
    first: float = math.nan  # until the first event of a stream
    longest_pause: float = 0.0  # between two events of a stream
    events: int = 0
    seconds: float = math.nan
    failure: str = ""
    came: str = ""  # the end of it, when it failed
    reconnected: bool = (
        False  # the server had closed the connection of an earlier request: asked again, as every client does
    )

    @property
    def ended(self) -> float:
        return self.begun + self.seconds

    def told(self) -> str:
        """A failure, for a person."""
        moment = time.strftime("%H:%M:%S", time.localtime(self.begun)) + f"{self.begun % 1:.3f}"[1:]
        request = f", request {self.id}" if self.id else ""
        came = f"; the end of what came: {self.came}" if self.came else "; nothing came"
        return f"{moment} #{self.number} {self.gateway}: {self.question.told()}: {self.failure} ({self.events} events in {self.seconds:.2f} s{request}){came}"


@dataclass
class Seen:
    """What came of a request so far."""

    data: bytes = b""
    events: int = 0

    def add(self, data: bytes) -> None:
        self.data = (self.data + data)[-CAME:]


@dataclass(frozen=True)
class Summary:
    """All requests of a time."""

    requests: int
    failed: int
    streams: int
    events: int
    seconds: float
    first_p50: float
    first_p99: float
    longest_pause: float
    longest_first: float
    longest_without: float  # the longest time in which no request ended well
    late: float  # the longest time by which this process itself was late, which is in every pause

    def told(self) -> str:
        """For a person."""
        return (
            f"{self.requests} requests in {self.seconds:.0f} s, {self.failed} failed; {self.streams} streams with {self.events} events; first event "
            f"p50 {self.first_p50 * 1000:.0f} p99 {self.first_p99 * 1000:.0f} max {self.longest_first * 1000:.0f} ms; longest pause within a stream "
            f"{self.longest_pause:.2f} s (this process was late by {self.late:.2f} s at most); {self.longest_without:.2f} s at most without an answer"
        )


@dataclass
class Load:
    """Clients that ask one request after the other, `streams` and `whole` of them at the same time."""

    gateways: Sequence[Gateway]
    models: Sequence[str]
    key: str
    streams: int = 12
    whole: int = 4
    tokens: tuple[int, int] = (1, 200)  # shortest and longest; as many of each power of two between them
    silence: float = 30.0  # a request in which nothing comes for so long has failed
    longest_pause: float = math.inf  # between two events of a stream; a longer one is a failure
    think: float = 0.2  # a client waits up to so long before it asks again
    says: Callable[[int], str] | None = None  # the right answer of so many tokens, where it is known
    record: Path | None = None  # a line of JSON for each request
    seed: int = 1
    outcomes: list[Outcome] = field(default_factory=list)
    late: list[tuple[float, float]] = field(default_factory=list)  # when this process itself was late, and by how much

    def __post_init__(self) -> None:
        self.over = threading.Event()
        self.without: set[str] = set()
        self.numbers = itertools.count(1)
        self.running: dict[int, Outcome] = {}
        self.thread = threading.Thread(target=lambda: asyncio.run(self.work()), daemon=True)

    def __enter__(self) -> Load:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.stop()
        if kind is None:
            self.check()

    def start(self) -> None:
        """Begin, and wait until every gateway has answered."""
        self.thread.start()
        end = time.monotonic() + self.silence
        waited = {gateway.name for gateway in self.gateways}
        while waited - {outcome.gateway for outcome in list(self.outcomes) if not outcome.failure}:
            if self.failures() or time.monotonic() > end:
                self.stop()
                self.check()
                raise AssertionError(f"the load does not get going: {self.summary().told()}")
            time.sleep(TICK)

    def stop(self) -> None:
        """Let running requests end, and ask nothing more."""
        self.over.set()
        self.thread.join()
        if self.record:
            with self.record.open("w") as file:
                file.writelines(json.dumps(asdict(outcome)) + "\n" for outcome in list(self.outcomes))

    def leave_out(self, *names: str) -> None:
        """Ask these gateways nothing more, as clients do whose name server or shared address says so; without names, ask all again."""
        self.without = set(names)

    def settle(self, seconds: float = 60.0) -> None:
        """Wait until all requests have ended that run now."""
        moment, end = time.time(), time.monotonic() + seconds
        while any(outcome.begun < moment for outcome in list(self.running.values())):
            assert time.monotonic() < end, f"a request runs for longer than {seconds:g} s"
            time.sleep(TICK)

    def failures(self, since: float = 0.0) -> list[Outcome]:
        """The requests that failed, those that began before this moment left out."""
        return [outcome for outcome in list(self.outcomes) if outcome.failure and outcome.begun >= since]

    def check(self) -> None:
        """Fail when a request failed, or nothing was asked."""
        assert self.outcomes, "not one request has ended"
        assert not self.failures(), self.report()

    def report(self) -> str:
        """Each request that failed: which, when, by which gateway, what came."""
        failed = self.failures()
        lines = [f"{len(failed)} of {len(self.outcomes)} requests failed:", *(each.told() for each in failed[:SHOWN])]
        if len(failed) > SHOWN:
            lines.append(f"... and {len(failed) - SHOWN} more")
        return "\n  ".join(lines)

    def summary(self, since: float = 0.0, until: float = math.inf) -> Summary:
        """What came of the requests that ended between two moments."""
        chosen = sorted((one for one in list(self.outcomes) if since <= one.ended <= until), key=lambda one: one.ended)
        streams = [one for one in chosen if one.question.stream and not one.failure]
        firsts = [one.first for one in streams] or [math.nan]
        percent = statistics.quantiles(firsts, n=100) if len(firsts) > 1 else firsts * 99
        good = [one.ended for one in chosen if not one.failure]
        begun = max(since, min((one.begun for one in chosen), default=since))
        return Summary(
            requests=len(chosen),
            failed=sum(bool(one.failure) for one in chosen),
            streams=len(streams),
            events=sum(one.events for one in streams),
            seconds=(chosen[-1].ended - begun) if chosen else 0.0,
            first_p50=percent[49],
            first_p99=percent[98],
            longest_pause=max((one.longest_pause for one in streams), default=0.0),
            longest_first=max(firsts),
            longest_without=max((later - before for before, later in itertools.pairwise([begun, *good])), default=math.inf),
            late=max((late for moment, late in self.late if since <= moment <= until), default=0.0),
        )  # fmt: skip

    # --- the clients

    async def work(self) -> None:
        """All clients, until it is over."""
        clients = [self.client(number) for number in range(self.streams + self.whole)]
        watch = asyncio.create_task(self.watch())
        await asyncio.gather(*clients)
        watch.cancel()

    async def watch(self) -> None:
        """How late this process is when it wants to do something: that much of a pause is its own."""
        while True:
            wanted = time.monotonic() + TICK
            await asyncio.sleep(TICK)
            if (late := time.monotonic() - wanted) > TICK:
                self.late.append((time.time(), late))

    async def client(self, number: int) -> None:
        """One client: its next request goes to the next gateway."""
        chance = random.Random(f"{self.seed} {number}")
        connections: dict[str, Connection] = {}
        for turn in itertools.count(number):
            if self.over.is_set():
                break
            used = [gateway for gateway in self.gateways if gateway.name not in self.without]
            if not used:
                await asyncio.sleep(TICK)
                continue
            gateway = used[turn % len(used)]
            shortest, longest = (math.log(limit) for limit in self.tokens)
            tokens = round(math.exp(chance.uniform(shortest, longest)))
            question = Question(
                model=self.models[turn // len(self.gateways) % len(self.models)],
                tokens=tokens,
                path=chance.choice((COMPLETIONS, CHAT)),
                stream=number < self.streams,
                text=self.says(tokens) if self.says else "",
            )
            outcome = Outcome(next(self.numbers), gateway.name, question, time.time())
            self.running[outcome.number] = outcome
            await self.one(outcome, gateway, connections)
            self.outcomes.append(outcome)
            del self.running[outcome.number]
            await asyncio.sleep(chance.uniform(0, self.think))
        for connection in connections.values():
            connection.close()

    async def one(self, outcome: Outcome, gateway: Gateway, connections: dict[str, Connection]) -> None:
        """One request, from its first byte to its last one."""
        begun = time.monotonic()
        seen = Seen()
        connection = connections.pop(gateway.name, None)
        try:
            async with asyncio.timeout(self.silence) as clock:
                try:
                    connection = connection or await self.open(gateway)
                    await self.answer(connection, outcome, begun, seen, clock)
                except ConnectionError:
                    if not connection or not connection.used or seen.data or outcome.status:
                        raise
                    outcome.reconnected = True
                    connection = await self.open(gateway)
                    await self.answer(connection, outcome, begun, seen, clock)
            if outcome.longest_pause > self.longest_pause:
                raise WrongError(f"it paused for {outcome.longest_pause:.2f} s")
        except TimeoutError:
            outcome.failure = f"nothing came for {self.silence:g} s"
        except (WrongError, BrokenError) as error:
            outcome.failure = str(error)
        except (OSError, EOFError, ValueError) as error:
            outcome.failure = f"{type(error).__name__}: {error}"
        outcome.seconds = time.monotonic() - begun
        outcome.events = seen.events
        if outcome.failure:
            outcome.came = repr(seen.data.decode(errors="replace")) if seen.data else ""
        if connection and connection.reusable and not outcome.failure:
            connections[gateway.name] = connection
        elif connection:
            connection.close()

    async def open(self, gateway: Gateway) -> Connection:
        """A new connection."""
        return await Connection.open(gateway.address, gateway.port, gateway.tls, gateway.server or gateway.address)

    async def answer(
        self, connection: Connection, outcome: Outcome, begun: float, seen: Seen, clock: asyncio.Timeout
    ) -> None:
        """Read an answer, and judge it."""
        loop = asyncio.get_running_loop()
        question = outcome.question
        head = await connection.ask(question.path, question.body(), self.key)
        outcome.status, outcome.id = head.status, head.headers.get("x-request-id", "")
        reading = Reading(question)
        streams = question.stream and head.status == 200
        whole = b""
        last = 0.0
        async for piece in connection.pieces(head):
            now = time.monotonic()
            clock.reschedule(loop.time() + self.silence)
            seen.add(piece)
            if not streams:
                whole += piece
                continue
            if not (events := reading.feed(piece)):
                continue
            if seen.events:
                outcome.longest_pause = max(outcome.longest_pause, now - last)
            else:
                outcome.first = now - begun
            seen.events += events
            last = now
        check_status(head.status)
        if streams:
            reading.end()
        else:
            check_whole(question, whole)
