"""The checks of a gateway as a process: against servers that break in every way, a stand-in for vLLM, and agents that ask for certificates.

Times are a tenth of the real ones, by the program's own options.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from tests.certificates import Authority, make_pair
from tests.gateway.checks import INTERVAL, RETRY, TIMEOUT, Agent, Checks, serve
from tests.stand_in.local import KEY, Running, unpack, up
from tests.upstream import Upstream, listening

ROOT = Path(__file__).resolve().parents[2]
MODEL = "small"
METRICS = "vllm:num_requests_running 0.0\nvllm:kv_cache_usage_perc {}\n"


class Backend(Upstream):
    """An instance. `status` is what it answers with: 0 never, -1 closes the connection."""

    url = ""
    status = 200
    kv = 0.0
    # How many are being asked, the most at once, and when each was asked.
    asking = 0
    most = 0
    asked: list[float]

    def get(self) -> tuple[int, str]:
        return 200, METRICS.format(self.kv)

    def post(self, body: bytes) -> tuple[int, str]:
        kind = type(self)
        kind.asked.append(time.monotonic())
        kind.asking += 1
        kind.most = max(kind.most, kind.asking)
        assert self.headers["Authorization"] == f"Bearer {KEY}"
        assert json.loads(body)["model"] == MODEL
        try:
            while kind.status == 0:
                time.sleep(0.2)  # some hundred may hang at once, beside those that are to be answered in time
        finally:
            kind.asking -= 1
        if kind.status == -1:
            self.close_connection = True
            return 0, ""
        text = json.dumps({"choices": [{"text": "Hi"}]}) if kind.status == 200 else "no"
        return kind.status, text

    def reply(self, status: int, text: str) -> None:
        if status:
            with contextlib.suppress(OSError):
                super().reply(status, text)


class AdminHandler(http.server.BaseHTTPRequestHandler):
    """Nginx, as far as it says what it has."""

    def do_GET(self) -> None:
        """GET /in_flight."""
        text = json.dumps(self.server.says).encode()  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text)

    def address_string(self) -> str:
        return ""

    def log_message(self, *_arguments: object) -> None:
        """Quiet."""


class Admin(http.server.ThreadingHTTPServer):
    """Its socket."""

    address_family = socket.AF_UNIX

    def server_bind(self) -> None:
        self.socket.bind(self.server_address)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def gateway(tmp_path: Path, authority: Authority) -> Iterator[Checks]:
    made = Checks(tmp_path, authority)
    made.prepare()
    yield made
    if made.process and made.process.poll() is None:
        made.end(signal.SIGKILL)


@pytest.fixture
def backend() -> Iterator[Any]:
    with listening(Backend) as found:
        found.asked = []
        yield found
        found.status = 200  # lets go whoever waits


@pytest.fixture
def other() -> Iterator[Any]:
    with listening(Backend) as found:
        found.asked = []
        yield found
        found.status = 200


@pytest.fixture
def agent(authority: Authority, tmp_path: Path) -> Iterator[Agent]:
    made = Agent()
    made.says("chat")
    serve(made, authority, tmp_path)
    yield made
    made.stop()


@pytest.fixture
def admin(gateway: Checks) -> Iterator[Any]:
    """Nginx, which takes up each state when a test says so."""
    server = Admin(str(gateway.path("run/admin.sock")), AdminHandler)  # type: ignore[arg-type]
    server.says = {"serial": 0, "in_flight": {}}  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


# --- answers --------------------------------------------------------------------------------------------------------


def test_a_backend_enters_with_its_first_good_answer(gateway: Checks, backend: Any) -> None:
    gateway.has("chat@a", backend.url)
    gateway.configure()
    gateway.start()
    assert gateway.used("chat@a"), "asked before the first state was told"
    use = gateway.use("chat@a")
    assert use == {
        "use": True, "why": "", "check": "ok", "operator": "up", "leaving": False, "kept": False, "since": use["since"], "tls": False, "share": 1.0,
    }  # fmt: skip
    written = json.loads(gateway.path("memory/chat@a.json").read_text())
    assert written["check"] == "ok"
    assert "chat@a is used: it answers [route small: 1 of 1 backends in use]" in gateway.log
    serial = gateway.state["serial"]
    lines = gateway.log
    before = gateway.state["time"]
    gateway.until(lambda: gateway.state["time"] > before)
    assert (gateway.state["serial"], gateway.log) == (serial, lines), "it says that it is alive, and nothing else"
    assert backend != {"kind": "embed"}


@pytest.mark.parametrize(
    ("status", "why"), [(500, "HTTP 500: no"), (404, "HTTP 404"), (-1, "the connection was closed")]
)
def test_wrong_answers_take_a_backend_out_and_two_good_ones_bring_it_back(
    gateway: Checks, backend: Any, status: int, why: str
) -> None:
    gateway.has("chat@a", backend.url)
    gateway.configure()
    gateway.start()
    backend.status = status
    assert gateway.until(lambda: not gateway.used("chat@a")) < INTERVAL + 3 * RETRY + 0.5
    assert why in gateway.use("chat@a")["why"]
    assert "chat@a is out of use: " in gateway.log and "NO BACKEND LEFT, clients get 503" in gateway.log
    backend.status = 200
    backend.asked.clear()
    gateway.until(lambda: gateway.used("chat@a"))
    assert len(backend.asked) == 2
    assert backend.most == 1


def test_a_refused_connection_is_out_after_two(gateway: Checks) -> None:
    with listening(Backend) as first:
        first.asked = []
        gateway.has("chat@a", first.url)
        gateway.configure()
        gateway.start()
    assert gateway.until(lambda: not gateway.used("chat@a")) < INTERVAL + 2 * RETRY + 0.5
    assert gateway.use("chat@a")["why"] == "it refuses connections"


def test_one_bad_answer_is_forgiven(gateway: Checks, backend: Any) -> None:
    gateway.has("chat@a", backend.url)
    gateway.configure()
    gateway.start()
    for _ in range(3):
        asked = len(backend.asked)
        backend.status = 500
        gateway.until(lambda: len(backend.asked) > asked)  # noqa: B023
        backend.status = 200
        gateway.stays(lambda: gateway.used("chat@a"), INTERVAL + 3 * RETRY)


def test_an_engine_that_hangs_is_out_and_asked_once_at_a_time(gateway: Checks, backend: Any) -> None:
    gateway.has("chat@a", backend.url)
    gateway.configure()
    gateway.start()
    backend.status = 0
    took = gateway.until(lambda: not gateway.used("chat@a"))
    assert took + 0.1 >= TIMEOUT and took < INTERVAL + TIMEOUT + 0.5, "20 s of silence, out in under 30"
    assert "its engine did nothing for 2 s" in gateway.use("chat@a")["why"]
    assert json.loads(gateway.path("memory/chat@a.json").read_text())["check"] == "failed"
    assert backend.asking <= 1
    backend.status = 200
    gateway.until(lambda: gateway.used("chat@a"))


def test_a_full_engine_that_works_is_never_out(gateway: Checks, backend: Any) -> None:
    """503 for as long as it lasts."""
    gateway.has("chat@a", backend.url)
    gateway.configure()
    gateway.start()
    backend.status = 503
    end = time.monotonic() + 2 * TIMEOUT
    while time.monotonic() < end:
        backend.kv += 0.001
        time.sleep(0.1)
        assert gateway.used("chat@a")
    assert gateway.until(lambda: not gateway.used("chat@a")) < TIMEOUT * 1.5, "and one that does not is"


def test_a_full_engine_enters_when_it_works(gateway: Checks, backend: Any) -> None:
    """Else a new gateway in front of a busy fleet would have nobody."""
    backend.status = 503
    gateway.has("chat@a", backend.url)
    gateway.configure()
    work = threading.Event()

    def works() -> None:
        while not work.wait(0.1):
            backend.kv += 0.001

    thread = threading.Thread(target=works)
    thread.start()
    try:
        gateway.start()
        gateway.until(lambda: gateway.used("chat@a"), TIMEOUT * 2)
    finally:
        work.set()
        thread.join()


# --- the stand-in for vLLM ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(tmp_path_factory.mktemp("stand-in"))


@pytest.fixture
def vllm(site: Path, tmp_path: Path) -> Iterator[Running]:
    home = tmp_path / "vllm"
    home.mkdir()
    (home / "stand_in.json").write_text('{"start_seconds": 0}')
    running = up(site, home)
    yield running
    running.process.send_signal(signal.SIGCONT)
    running.process.kill()
    running.process.wait()


def prompt(running: Running, **settings: Any) -> threading.Thread:
    """Ask for a completion in a thread of its own."""
    body = {"model": running.model, "prompt": "Hi", "max_tokens": 1, "stand_in": settings}

    def ask() -> None:
        with contextlib.suppress(OSError):
            running.ask("/v1/completions", body)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    return thread


def test_a_long_prompt_does_not_take_a_backend_out(gateway: Checks, vllm: Running) -> None:
    """One prompt of three times the timeout, computed alone: the question waits behind it, and only the KV cache moves."""
    gateway.has("chat@a", f"http://127.0.0.1:{vllm.port}")
    gateway.configure()
    gateway.start()
    before = vllm.ask("/metrics").text
    thread = prompt(vllm, prefill_seconds=3 * TIMEOUT)
    gateway.stays(lambda: gateway.used("chat@a"), 1.5 * TIMEOUT)
    during = vllm.ask("/metrics").text
    counts = "vllm:iteration_tokens_total_count{"
    assert [line for line in before.splitlines() if line.startswith(counts)] != []
    assert thread.is_alive()
    time.sleep(0.3)
    later = vllm.ask("/metrics").text
    assert [one for one in during.splitlines() if one.startswith(counts)] == [
        one for one in later.splitlines() if one.startswith(counts)
    ], "as vLLM: no iteration is counted"
    gateway.stays(lambda: gateway.used("chat@a"), 2 * TIMEOUT)
    thread.join(TIMEOUT)
    assert not thread.is_alive()


def test_a_stand_in_that_hangs_is_out_whoever_comes_and_goes(gateway: Checks, vllm: Running) -> None:
    gateway.has("chat@a", f"http://127.0.0.1:{vllm.port}")
    gateway.configure()
    gateway.start()
    vllm.command(answers="hang")
    for _ in range(5):
        prompt(vllm)
        time.sleep(0.2)
    assert gateway.until(lambda: not gateway.used("chat@a")) < INTERVAL + TIMEOUT + 0.5
    assert "its engine did nothing" in gateway.use("chat@a")["why"]


def test_a_process_that_is_stopped_is_out_and_comes_back(gateway: Checks, vllm: Running) -> None:
    gateway.has("chat@a", f"http://127.0.0.1:{vllm.port}")
    gateway.configure()
    gateway.start()
    vllm.process.send_signal(signal.SIGSTOP)
    assert gateway.until(lambda: not gateway.used("chat@a")) < INTERVAL + TIMEOUT + 0.5
    vllm.process.send_signal(signal.SIGCONT)
    gateway.until(lambda: gateway.used("chat@a"))


def test_a_backend_whose_model_is_another_is_not_used(gateway: Checks, vllm: Running) -> None:
    gateway.has("chat@a", f"http://127.0.0.1:{vllm.port}")
    gateway.configure()
    fleet = json.loads(gateway.path("fleet.json").read_text())
    fleet["routes"][0]["model"] = "large"
    gateway.path("fleet.json").write_text(json.dumps(fleet))
    gateway.start()
    assert not gateway.used("chat@a")
    assert "The model `large` does not exist" in gateway.use("chat@a")["why"]


# --- what hosts say -------------------------------------------------------------------------------------------------


def test_a_host_that_wants_to_stop_is_let_go(
    gateway: Checks, backend: Any, other: Any, agent: Agent, admin: Any
) -> None:
    gateway.has("chat@a", backend.url, agent)
    gateway.has("chat@b", other.url)
    gateway.configure(least=1)
    gateway.start()
    assert gateway.used("chat@a") and gateway.used("chat@b")
    admin.says = {"serial": gateway.state["serial"], "in_flight": {"chat@a": 3, "chat@b": 1}}
    gateway.until(
        lambda: (
            agent.told[-1]
            == {"gateway": "gw-1", "out": [], "kept": {}, "in_flight": {"chat": 3}, "unrouted": [], "tls": True}
        )
    )
    agent.says("chat", leaving=True)
    assert gateway.until(lambda: not gateway.used("chat@a")) < 1
    told = len(agent.told)
    gateway.until(lambda: len(agent.told) > told + 3)
    assert agent.told[-1]["out"] == [], "Nginx has not taken it up yet"
    admin.says = {"serial": gateway.state["serial"], "in_flight": {"chat@a": 2}}
    gateway.until(
        lambda: (
            agent.told[-1]
            == {"gateway": "gw-1", "out": ["chat"], "kept": {}, "in_flight": {"chat": 2}, "unrouted": [], "tls": True}
        )
    )
    assert len(agent.connections) == 1, "one connection for all"
    assert "chat@a is out of use: its host is about to stop it [route small: 1 of 2 backends in use]" in gateway.log
    agent.says("chat")
    gateway.until(lambda: gateway.used("chat@a"))
    # the line comes after the state
    gateway.until(lambda: "chat@a is used: nobody wants it out any more" in gateway.log)


def test_the_minimum_keeps_who_wants_to_leave_and_says_so(
    gateway: Checks, backend: Any, other: Any, agent: Agent
) -> None:
    gateway.has("chat@a", backend.url, agent)
    gateway.has("chat@b", other.url)
    gateway.configure(least=2)
    gateway.start()
    agent.says("chat", "drained", reason="new fan")
    gateway.until(lambda: gateway.use("chat@a")["kept"])
    why = "drained by alice: new fan; kept, because the route small needs at least 2 of its backends"
    assert gateway.use("chat@a") | {"since": 0} == {
        "use": True, "why": why, "check": "ok", "operator": "drained", "leaving": False, "kept": True, "since": 0, "tls": False, "share": 1.0,
    }  # fmt: skip
    gateway.until(lambda: agent.told[-1]["kept"] == {"chat": why})
    assert agent.told[-1]["out"] == []
    backend.status = 500
    gateway.until(lambda: not gateway.used("chat@a"))
    assert not gateway.use("chat@a")["kept"], "the minimum keeps nobody who fails"


def test_where_nginx_does_not_run_nothing_is_in_flight(gateway: Checks, backend: Any, agent: Agent) -> None:
    gateway.has("chat@a", backend.url, agent)
    gateway.configure()
    gateway.start()
    agent.says("chat", leaving=True)
    gateway.until(lambda: agent.told and agent.told[-1]["out"] == ["chat"])
    assert agent.told[-1]["in_flight"] == {"chat": 0}


def test_who_was_drained_while_the_gateway_was_away_does_not_enter(gateway: Checks, backend: Any, agent: Agent) -> None:
    gateway.has("chat@a", backend.url, agent)
    gateway.configure()
    gateway.start()
    gateway.end()
    gateway.path("run/state.json").unlink()  # it was switched off
    agent.says("chat", "drained")
    gateway.start()
    assert not gateway.used("chat@a")
    gateway.stays(lambda: not gateway.used("chat@a"), 2 * INTERVAL)
    assert gateway.use("chat@a")["check"] == "ok"


def test_what_a_host_said_last_counts_when_it_is_silent(
    gateway: Checks, backend: Any, agent: Agent, authority: Authority
) -> None:
    gateway.has("chat@a", backend.url, agent)
    gateway.configure()
    agent.says("chat", "drained")
    gateway.start()
    assert not gateway.used("chat@a")
    agent.stop()
    gateway.stays(lambda: not gateway.used("chat@a"), 2 * INTERVAL)
    gateway.end()
    gateway.path("run/state.json").unlink()
    gateway.start()
    gateway.stays(lambda: not gateway.used("chat@a"), 2 * INTERVAL)
    agent.says("chat")
    serve(agent, authority, gateway.directory, agent.port)
    gateway.until(lambda: gateway.used("chat@a"))
    agent.stop = lambda: None


def test_without_a_certificate_hosts_have_no_opinion(gateway: Checks, backend: Any, agent: Agent) -> None:
    gateway.prepare(certificate=False)
    gateway.has("chat@a", backend.url, agent)
    gateway.configure()
    agent.says("chat", "drained")
    gateway.start()
    assert gateway.used("chat@a")
    assert agent.told == []
    # systemd starts it again when there is one, and gives it that
    gateway.prepare()
    assert gateway.process and gateway.process.wait(5) == 0
    gateway.start()
    assert not gateway.used("chat@a")


def test_a_certificate_that_does_not_fit_its_key_stops_no_check(gateway: Checks, backend: Any, agent: Agent) -> None:
    (gateway.path("credentials") / "fleet_key").write_text(gateway.authority.sign("gw-1")[1])
    gateway.has("chat@a", backend.url, agent)
    gateway.configure()
    gateway.start()
    assert gateway.used("chat@a")
    assert "the certificate of the fleet cannot be used (KEY_VALUES_MISMATCH)" in gateway.log
    assert agent.told == []


def test_an_agent_of_another_authority_is_not_believed(gateway: Checks, backend: Any, tmp_path: Path) -> None:
    wrong = Agent()
    wrong.says("chat", "drained")
    serve(wrong, Authority(), tmp_path)
    gateway.has("chat@a", backend.url, wrong)
    gateway.configure()
    gateway.start()
    gateway.stays(lambda: gateway.used("chat@a"), INTERVAL)
    assert wrong.told == []
    wrong.stop()


# --- restarts and changes -------------------------------------------------------------------------------------------


def test_a_restart_changes_nothing(gateway: Checks, backend: Any, other: Any) -> None:
    other.status = 500
    gateway.has("chat@a", backend.url)
    gateway.has("chat@b", other.url)
    gateway.configure()
    gateway.start()
    gateway.until(lambda: gateway.use("chat@b")["check"] == "failed")
    before = gateway.state
    backend.status = other.status = 0  # neither says anything new
    lines = len(gateway.log.splitlines())
    gateway.end(signal.SIGKILL)
    gateway.start()
    assert gateway.state["backends"] == before["backends"]
    assert gateway.state["serial"] == before["serial"]
    assert len(gateway.log.splitlines()) == lines + 1


def test_after_a_boot_what_was_written_down_is_believed(gateway: Checks, backend: Any, other: Any) -> None:
    other.status = 500
    gateway.has("chat@a", backend.url)
    gateway.has("chat@b", other.url)
    gateway.configure()
    gateway.start()
    gateway.until(lambda: gateway.use("chat@b")["check"] == "failed")
    gateway.end()
    gateway.path("run/state.json").unlink()
    backend.status = other.status = 0
    gateway.start()
    assert (gateway.used("chat@a"), gateway.used("chat@b")) == (True, False)


def test_a_change_of_the_fleet_is_taken_up(gateway: Checks, backend: Any, other: Any) -> None:
    gateway.has("chat@a", backend.url)
    gateway.configure()
    gateway.start()
    serial = gateway.state["serial"]
    gateway.has("chat@b", other.url)
    gateway.configure()
    gateway.until(lambda: "chat@b" in gateway.state["backends"] and gateway.used("chat@b"))
    assert gateway.state["serial"] > serial
    del gateway.backends["chat@a"]
    gateway.configure()
    gateway.until(lambda: list(gateway.state["backends"]) == ["chat@b"])
    assert not gateway.path("memory/chat@a.json").exists(), "one that comes back is new"
    asked = len(backend.asked)
    gateway.stays(lambda: len(backend.asked) == asked, 2 * INTERVAL)
    gateway.path("fleet.json").write_text("{")
    gateway.until(lambda: "cannot be read" in gateway.log)
    gateway.stays(lambda: gateway.used("chat@b"), INTERVAL)


def test_a_fleet_for_another_key_ends_the_checks_and_leaves_the_state(gateway: Checks, backend: Any) -> None:
    gateway.has("chat@a", backend.url)
    gateway.configure()
    gateway.start()
    gateway.configure(key="another")
    assert gateway.process and gateway.process.wait(5) == 1
    assert "made for another internal key" in gateway.log
    assert gateway.used("chat@a")
    assert KEY not in gateway.log


def test_the_key_is_nowhere(gateway: Checks, backend: Any) -> None:
    gateway.has("chat@a", backend.url)
    gateway.configure()
    gateway.start()
    backend.status = 401
    gateway.until(lambda: not gateway.used("chat@a"))
    for file in gateway.directory.rglob("*"):
        if file.is_file() and file.name != "internal_key":
            assert KEY not in file.read_text(), file


def test_hundreds_of_backends_are_checked_at_once(gateway: Checks, backend: Any) -> None:
    """Of which half hang; one server stands for those that answer, one for those that do not."""
    with listening(Backend) as hung:
        hung.asked, hung.status = [], 0
        for number in range(300):
            gateway.has(f"chat@{number}", hung.url if number % 2 else backend.url)
        gateway.options = {"interval": 5.0, "timeout": 5.0}
        gateway.configure()
        gateway.start()
        gateway.until(lambda: sum(use["use"] for use in gateway.state["backends"].values()) == 150, 10)
        gateway.until(lambda: sum(use["check"] == "failed" for use in gateway.state["backends"].values()) == 150, 20)
        begun, spent = time.monotonic(), cpu(gateway)
        time.sleep(5)
        assert (cpu(gateway) - spent) / (time.monotonic() - begun) < 0.5, "of a core"
        assert sum(use["use"] for use in gateway.state["backends"].values()) == 150
        hung.status = 200


def cpu(gateway: Checks) -> float:
    """Seconds of a core that the checks have used."""
    assert gateway.process
    fields = Path(f"/proc/{gateway.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_the_state_says_when_the_certificates_end(gateway: Checks, backend: Any, authority: Authority) -> None:
    """Those of the files that are there now; without a file nothing is said."""
    gateway.has("chat@a", backend.url)
    gateway.configure()
    gateway.start()
    gateway.until(lambda: set(gateway.state["certificates"]) == {"fleet"})
    end = x509.load_pem_x509_certificate((gateway.path("credentials") / "fleet_cert").read_bytes()).not_valid_after_utc
    assert gateway.state["certificates"]["fleet"] == int(end.timestamp())
    for days in (30, 90):
        pair, _ = make_pair(days)
        aside = gateway.path("fullchain.new")
        aside.write_text(pair + authority.pem)
        aside.rename(gateway.path("fullchain.pem"))
        gateway.until(lambda: "tls" in gateway.state["certificates"])
        wanted = time.time() + days * 86400
        gateway.until(lambda: abs(gateway.state["certificates"]["tls"] - wanted) < 120)  # noqa: B023


# --- backends that speak TLS


def with_tls(authority: Authority, home: Path, host: str = "a") -> dict[str, object]:
    """The options of a stand-in that speaks TLS, with the files that they name."""
    cert, key = authority.sign(host)
    for name, text in (("ca", authority.pem), ("cert", cert), ("key", key)):
        (home / f"{name}.pem").write_text(text)
    files = {"ssl-certfile": "cert", "ssl-keyfile": "key", "ssl-ca-certs": "ca"}
    return {"ssl-cert-reqs": 2, **{option: str(home / f"{name}.pem") for option, name in files.items()}}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    made = tmp_path / "vllm"
    made.mkdir()
    (made / "stand_in.json").write_text('{"start_seconds": 0}')
    return made


def test_a_backend_goes_over_to_tls_as_its_host_says(
    gateway: Checks, agent: Agent, authority: Authority, home: Path, site: Path
) -> None:
    """Whatever the inventory says: whether a generation speaks TLS knows the host on which it runs. It is used when it has answered by it."""
    plain = up(site, home)
    agent.says("chat", scheme="http")
    gateway.has("chat@a", f"https://127.0.0.1:{plain.port}", agent)
    gateway.configure()
    gateway.start()
    assert gateway.used("chat@a") and not gateway.use("chat@a")["tls"]
    before = gateway.state["serial"]
    plain.process.kill()
    plain.process.wait()
    secured = up(site, home, KEY, port=plain.port, **with_tls(authority, home))
    agent.says("chat", scheme="https")
    gateway.until(lambda: gateway.use("chat@a")["tls"] and gateway.used("chat@a"))
    assert gateway.state["serial"] >= before + 2, "it was out until it had answered by TLS"
    assert "chat@a is asked by TLS from now on, as a says" in gateway.log
    # what the host said last counts, also after a restart of the checks and while its agent is away
    gateway.end()
    agent.stop()
    gateway.backends["chat@a"]["tls"] = False
    gateway.configure()
    gateway.start()
    gateway.stays(lambda: gateway.use("chat@a")["tls"] and gateway.used("chat@a"), 3 * INTERVAL)
    secured.process.kill()
    secured.process.wait()


def test_of_a_host_that_has_said_nothing_the_inventory_counts(
    gateway: Checks, agent: Agent, authority: Authority, home: Path, site: Path
) -> None:
    """Before its first generation, and where there is no agent."""
    agent.says("chat", scheme="")
    secured = up(site, home, KEY, **with_tls(authority, home))
    gateway.has("chat@a", f"https://127.0.0.1:{secured.port}", agent)
    gateway.has("chat@b", f"http://127.0.0.1:{secured.port}")
    gateway.configure()
    gateway.start()
    gateway.until(lambda: gateway.used("chat@a") and gateway.use("chat@b")["check"] == "failed")
    assert (gateway.use("chat@a")["tls"], gateway.use("chat@b")["tls"]) == (True, False)
    gateway.backends["chat@b"]["tls"] = True
    gateway.configure()
    gateway.until(lambda: gateway.used("chat@b"))
    secured.process.kill()
    secured.process.wait()


def test_a_backend_with_a_wrong_certificate_is_out_and_is_told_no_key(
    gateway: Checks, agent: Agent, authority: Authority, home: Path, site: Path
) -> None:
    secured = up(site, home, KEY, **with_tls(Authority(), home))
    agent.says("chat", scheme="https")
    gateway.has("chat@a", f"https://127.0.0.1:{secured.port}", agent)
    gateway.configure()
    gateway.start()
    gateway.until(lambda: gateway.use("chat@a")["check"] == "failed")
    assert "its certificate is not the one of the fleet" in gateway.use("chat@a")["why"]
    secured.process.kill()
    secured.process.wait()


@pytest.mark.parametrize("lacks", ["Nginx", "certificate"])
def test_a_gateway_that_cannot_speak_tls_says_so(gateway: Checks, backend: Any, lacks: str) -> None:
    if lacks == "Nginx":
        gateway.backend_tls = False
    else:
        gateway.prepare(certificate=False)
    gateway.has("chat@a", backend.url.replace("http:", "https:"))
    gateway.configure()
    gateway.start()
    gateway.until(lambda: gateway.use("chat@a")["check"] == "failed")
    assert gateway.use("chat@a")["why"] == "it speaks TLS, and this gateway has no certificate of the fleet for it"
    assert backend.asked == []
