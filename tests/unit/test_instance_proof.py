"""What an instance has to show before traffic: how it is asked, and which answers are right. Against the stand-in, which can answer nonsense."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import instance_proof, instance_proof_host, sound_form
from ansible_collections.gpufleet.llm.plugins.module_utils.instance_proof import Answer, AnswerError
from ansible_collections.gpufleet.llm.plugins.modules import instance_proof as module_of

from tests import tiny_models
from tests.stand_in.local import KEY, Running, unpack, up

ASKED = {"role": "user", "content": "What is the capital of France?"}
CAPITAL = {"name": "capital", "messages": [ASKED], "max_tokens": 7, "matches": r"\bParis\b"}
EXACT = {
    "name": "exact",
    "prompt": "The capital of France is",
    "max_tokens": 7,
    "expect": "Paris is the capital of France.",
}
KNOWN = {"name": "known", "prompt": "We hold these truths to be self-evident", "max_tokens": 1, "max_distance": 0.2}
WARM = {"prompt": "All work and no play makes a dull boy", "max_tokens": 2, "times": 6, "parallel": 3}


# --- deciding


def asked(**entry: Any) -> instance_proof.Question:
    return instance_proof.questions([entry])[0]


@pytest.mark.parametrize(
    ("entry", "text", "complaint"),
    [
        ({"prompt": "x", "expect": "Paris"}, " Paris\n", ""),
        ({"prompt": "x", "expect": "Paris"}, "Paris!", "it answered 'Paris!', and not 'Paris'"),
        ({"prompt": "x", "matches": "(?i)paris"}, "It is PARIS.", ""),
        ({"prompt": "x", "matches": "^Paris"}, "It is Paris", "it answered 'It is Paris', in which '^Paris' is not found"),
        ({"prompt": "x", "expect": "y"}, "z " * 300, "..., and not".replace("...", "...'")),
        ({"prompt": "x", "expect": "y"}, "", "it answered '', and not 'y'"),
    ],
)  # fmt: skip
def test_a_text_is_compared_or_searched(entry: dict[str, Any], text: str, complaint: str) -> None:
    found = instance_proof.wrong(asked(**entry), Answer(text))
    assert (not found) if not complaint else (complaint in found[0] and len(found[0]) < 250), found


def test_numbers_have_no_text() -> None:
    assert "max_distance" in instance_proof.wrong(asked(input="x", expect="y"), Answer(None, (1.0,)))[0]


@pytest.mark.parametrize(
    ("form", "before", "now", "expected"),
    [
        ("prompt", [-1, -2, -3], [-1, -2, -3], 0),
        ("prompt", [-1, -2, -3], [-1.3, -1.7, -3], 0.2),
        ("input", [1, 0, 3], [2, 0, 6], 0),  # a vector of another length and the same direction
        ("input", [2, 0], [0, 2], 1),
        ("input", [0.5, 0.5], [0.25, 0.75], 0.25),  # classes
        ("documents", [0.9, 0.1], [0.8, 0.1], 0.05),
        ("input", [0.0, 0.0], [1.0, 1.0], math.inf),
    ],
)
def test_a_distance(form: str, before: list[float], now: list[float], expected: float) -> None:
    assert instance_proof.distance(form, before, now) == pytest.approx(expected)


def test_another_tokenizer_cannot_be_compared() -> None:
    with pytest.raises(AnswerError, match="it told 2 numbers, the release before 1: another tokenizer"):
        instance_proof.distance("prompt", [-1], [-1, -2])


def test_what_is_no_number_is_too_far() -> None:
    """Broken weights may give NaN, of which every comparison is false."""
    _far, text = instance_proof.too_far(asked(**KNOWN), [-1.0, -2.0], [math.nan, -2.0])
    assert "may be 0.2" in text
    far, text = instance_proof.too_far(asked(**KNOWN), [-1.0, -2.0], [-1.1, -2.0])
    assert far == pytest.approx(0.05) and text == ""


def test_text_is_made_greedily_unless_its_fields_say_otherwise() -> None:
    body = asked(prompt="x", expect="y", fields={"seed": 7, "chat_template_kwargs": {"enable_thinking": False}}).body
    assert body == {
        "prompt": "x",
        "max_tokens": 32,
        "temperature": 0,
        "seed": 7,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert asked(input="x", max_distance=1).body == {"input": "x"}
    assert asked(query="q", documents=["a"], max_distance=1).body == {"query": "q", "documents": ["a"]}
    assert asked(**KNOWN).body["prompt_logprobs"] == 0


def test_a_question_is_known_again_without_its_text() -> None:
    assert asked(**KNOWN).key == asked(**{**KNOWN, "name": "renamed", "max_distance": 3}).key
    assert asked(**KNOWN).key != asked(**{**KNOWN, "prompt": "another"}).key
    assert "truths" not in asked(**KNOWN).key


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        (
            {"name": "a", "expect": "x"},
            "must ask one of prompt, messages, input, documents, audio; it has none of them.",
        ),
        ({"name": "a", "prompt": "x", "input": "y", "expect": "x"}, "it has prompt and input."),
        ({"name": "a", "documents": ["x"], "max_distance": 1}, "ranked by a query, which is missing"),
        ({"name": "a", "prompt": "x"}, "it needs expect, matches or max_distance."),
        ({"name": "a", "prompt": "x", "matches": "("}, "matches is no regular expression"),
        ({"name": "a", "prompt": "x", "expect": " "}, "expect is empty"),
        ({"name": "a", "prompt": "x", "max_distance": 0}, "max_distance is 0; it must be a number above 0."),
        ({"name": "a", "audio": "/x.wav", "max_distance": 1}, "what is heard has none"),
        ({"name": "a", "prompt": "x", "expect": "y", "max_tokens": 0}, "max_tokens is 0; it must be 1 or more."),
        ({"name": "a", "prompt": "x", "expect": "y", "fields": {"model": "m"}}, "fields has model"),
        (
            {"name": "a", "prompt": "x", "expect": "y", "instances": ["caht"]},
            "no host has an instance caht; there are chat.",
        ),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(entry: dict[str, Any], complaint: str) -> None:
    [found] = instance_proof.problems("turn_questions", [entry], ["chat"], judged=True)
    assert complaint in found
    assert found.startswith("turn_questions[0] (a): ")


def test_questions_that_make_sense_are_not() -> None:
    entries = [CAPITAL, EXACT, {**KNOWN, "instances": ["chat"]}]
    assert instance_proof.problems("turn_questions", entries, ["chat"], judged=True) == []
    assert instance_proof.problems("turn_warm_up", [WARM]) == []
    twice = instance_proof.problems("turn_questions", [CAPITAL, CAPITAL], judged=True)
    assert twice == ["turn_questions has 2 entries called capital; each needs a name of its own."]


# --- asking


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in, unpacked."""
    return unpack(tmp_path_factory.mktemp("stand-in"))


@pytest.fixture(scope="module")
def server(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = up(site, tmp_path_factory.mktemp("server"))
    yield running
    running.process.kill()
    running.process.wait()


@pytest.fixture
def host(tmp_path: Path, server: Running, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host whose instance `chat` runs its generation 7, and answers."""
    server.command(seconds_per_token=0.001)
    for name in ("RUNTIME", "WORDS", "KEPT"):
        monkeypatch.setattr(instance_proof_host, name, tmp_path / name)
    generation = tmp_path / "vllm/chat/7"
    generation.mkdir(parents=True)
    (generation / "gate.json").write_text(
        json.dumps({"name": "chat", "url": f"http://127.0.0.1:{server.port}", "model": server.model})
    )
    (generation / "confirmed").touch()
    (generation.parent / "current").symlink_to("7")
    (tmp_path / "vllm/internal_key").write_text(f"{KEY}\n")
    return tmp_path


class Finished(Exception):  # noqa: N818 -- it is none
    """How a module ends."""


class FakeModule:
    """Stands in for AnsibleModule."""

    check_mode = False

    def __init__(self, params: dict[str, Any]) -> None:
        self.params = params
        self.result: dict[str, Any] = {"warnings": []}

    def warn(self, text: str) -> None:
        self.result["warnings"].append(text)

    def exit_json(self, **result: Any) -> None:
        self.result |= result
        raise Finished

    def fail_json(self, **result: Any) -> None:
        self.exit_json(failed=True, **result)

    def result_of(self, module: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        """Run a module with these parameters."""
        monkeypatch.setattr(module, "AnsibleModule", lambda **_options: self)
        with pytest.raises(Finished):
            module.main()
        return self.result


def run(host: Path, monkeypatch: pytest.MonkeyPatch, **params: Any) -> dict[str, Any]:
    """What the module says; `failed` when it fails."""
    module = FakeModule({
        "state": "proved", "instances": ["chat"], "warm_up": [], "questions": [], "questions_mode": "fail", "timeout": 30,
        "config_path": str(host / "vllm"), **params,
    })  # fmt: skip
    return module.result_of(module_of, monkeypatch)


def test_right_answers_pass(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(host, monkeypatch, warm_up=[WARM], questions=[CAPITAL, EXACT])
    assert "failed" not in found, found
    [proof] = found["proofs"]
    assert proof["warm_up"]["asked"] == 6
    assert [(one["name"], one["passed"]) for one in proof["questions"]] == [("capital", True), ("exact", True)]
    assert proof["notes"] == []


def test_nonsense_is_found_by_each_way(host: Path, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The status is 200, the text is there, and the gate passes it."""
    questions = [CAPITAL, EXACT, KNOWN]
    [kept] = run(host, monkeypatch, state="remembered", questions=questions)["remembered"]
    assert (kept["asked"], kept["kept"], kept["notes"]) == (3, False, [])
    assert "failed" not in run(host, monkeypatch, questions=questions)
    server.command(answers="nonsense", seconds_per_token=0.001)
    found = run(host, monkeypatch, questions=questions)
    assert found["failed"]
    lines = found["msg"].splitlines()
    assert lines[0].startswith("chat: capital: it answered 'zq ##")
    assert lines[1].endswith("and not 'Paris is the capital of France.'")
    assert lines[2] == "chat: known: it is 9.5 away from the release before, and may be 0.2"
    assert KEY not in json.dumps(found)


def test_nonsense_may_be_a_warning(host: Path, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    server.command(answers="nonsense")
    found = run(host, monkeypatch, questions=[CAPITAL], questions_mode="warn")
    assert "failed" not in found
    assert len(found["wrong"]) == 1
    assert "turn_questions_mode" in found["warnings"][0]


def test_a_warm_up_that_is_refused_fails_also_where_answers_are_warned_of(
    host: Path, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(host, monkeypatch, warm_up=[{**WARM, "max_tokens": 100000}], questions_mode="warn")
    assert found["failed"]
    assert found["msg"].startswith("chat: warm-up: prompt 1: /v1/completions: it answered HTTP 400: ")
    assert "maximum context length" in found["msg"]


def test_it_is_bounded(host: Path, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    server.command(answers="hang")
    found = run(host, monkeypatch, warm_up=[WARM], questions=[CAPITAL], timeout=1)
    assert "no answer when the 1 s for all of them were over" in found["msg"]
    assert "capital" not in found["msg"], "after a failed warm-up nothing is asked"


def test_what_is_meant_for_another_kind_of_model_is_said_and_not_asked(
    host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {"name": "vector", "input": "x", "max_distance": 1}
    found = run(host, monkeypatch, questions=[other, CAPITAL])
    assert "failed" not in found
    assert found["proofs"][0]["notes"] == [
        "vector: it has no /v1/embeddings and no /classify and no /pooling; not asked"
    ]
    assert run(host, monkeypatch, questions=[{**other, "instances": ["chat"]}])["failed"]
    assert (
        run(host, monkeypatch, questions=[{**CAPITAL, "instances": ["other"], "expect": "never"}])["proofs"][0][
            "questions"
        ]
        == []
    )


def test_without_an_answer_from_before_nothing_is_compared(
    host: Path, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first deployment, or a release that did not answer any more: that must not keep the one that repairs it out."""
    found = run(host, monkeypatch, questions=[KNOWN])
    assert "failed" not in found
    assert found["proofs"][0]["notes"] == ["known: its distance is not judged: the release before was not asked it"]
    server.command(answers="500")
    [told] = run(host, monkeypatch, state="remembered", questions=[KNOWN])["remembered"]
    assert "it answered HTTP 500" in told["notes"][0]
    server.command()
    [proof] = run(host, monkeypatch, questions=[KNOWN])["proofs"]
    assert "the release before did not answer it" in proof["notes"][0]


def test_a_run_that_died_does_not_take_the_new_release_for_the_old_one(
    host: Path, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(host, monkeypatch, state="remembered", questions=[KNOWN])
    server.command(answers="nonsense")
    word = host / "WORDS/chat.json"
    word.parent.mkdir()
    word.write_text(json.dumps({"operator": "drained", "turn": "upgrade"}))
    assert run(host, monkeypatch, state="remembered", questions=[KNOWN])["remembered"][0]["kept"]
    assert run(host, monkeypatch, questions=[KNOWN])["failed"]
    # also where no agent keeps a word: what was not confirmed is not what served
    word.unlink()
    (host / "vllm/chat/7/confirmed").unlink()
    assert run(host, monkeypatch, state="remembered", questions=[KNOWN])["remembered"][0]["kept"]
    # a turn that ended has made it the one that serves
    (host / "vllm/chat/7/confirmed").touch()
    assert not run(host, monkeypatch, state="remembered", questions=[KNOWN])["remembered"][0]["kept"]
    assert "failed" not in run(host, monkeypatch, questions=[KNOWN])


def test_a_question_that_the_release_before_answers_wrong_may_be_a_wrong_one(
    host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said while nothing has changed, and again when it fails."""
    bad = {**CAPITAL, "matches": "London"}
    [told] = run(host, monkeypatch, state="remembered", questions=[bad])["remembered"]
    assert told["notes"][0].endswith("in which 'London' is not found; is it the right question?")
    assert run(host, monkeypatch, questions=[bad])["msg"].endswith(
        "answered it wrong, too: it may be a wrong question)"
    )
    assert "wrong, too" not in run(host, monkeypatch, questions=[{**bad, "matches": "Rome"}])["msg"]


def test_going_back_from_nonsense_is_not_kept_out_by_its_distance(
    host: Path, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way back has to be free: generation 8 answers nonsense, and 7, which is right, is far from it."""
    (host / "vllm/chat/7").rename(host / "vllm/chat/8")
    (host / "RUNTIME/chat").mkdir(parents=True)
    running = host / "RUNTIME/chat/generation"
    running.write_text("8\n")
    (host / "vllm/chat/current").unlink()
    (host / "vllm/chat/current").symlink_to("8")
    server.command(answers="nonsense")
    assert run(host, monkeypatch, state="remembered", questions=[KNOWN])["remembered"][0]["asked"] == 1
    server.command()
    assert run(host, monkeypatch, questions=[KNOWN])["failed"]
    running.write_text("7\n")
    [proof] = run(host, monkeypatch, questions=[KNOWN, CAPITAL])["proofs"]
    assert proof["notes"] == ["known: its distance is not judged: this goes back, from generation 8 to 7"]


def test_a_release_that_answered_wrong_is_no_reference(
    host: Path, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the release that mends it is kept out for being different."""
    server.command(answers="nonsense")
    run(host, monkeypatch, state="remembered", questions=[KNOWN, CAPITAL])
    server.command()
    found = run(host, monkeypatch, questions=[KNOWN, CAPITAL])
    assert "failed" not in found
    assert "answered other questions wrong" in found["proofs"][0]["notes"][0]


def test_an_instance_without_a_generation_is_said(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(host / "vllm/chat")
    assert "it has no generation" in run(host, monkeypatch, questions=[CAPITAL])["msg"]
    assert run(host, monkeypatch, state="remembered", questions=[KNOWN])["remembered"][0]["asked"] == 0


@pytest.mark.parametrize(
    ("kind", "question"),
    [
        ("embed", {"input": "red", "max_distance": 0.01}),
        ("rerank", {"query": "q", "documents": ["one", "two"], "max_distance": 0.01}),
        ("classify", {"input": "red", "max_distance": 0.01}),
        ("pool", {"input": "red green", "max_distance": 0.01}),
    ],
)
def test_every_kind_of_model_is_compared_with_itself(
    site: Path,
    host: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    question: dict[str, Any],
) -> None:
    home = tmp_path_factory.mktemp(kind)
    server = up(site, home, **{"model": str(tiny_models.write(home, kind)), "max-model-len": "auto"})
    gate = {"name": "chat", "url": f"http://127.0.0.1:{server.port}", "model": server.model}
    (host / "vllm/chat/7/gate.json").write_text(json.dumps(gate))
    questions = [{"name": "one", **question}]
    assert run(host, monkeypatch, state="remembered", questions=questions)["remembered"][0]["asked"] == 1
    [proof] = run(host, monkeypatch, questions=questions)["proofs"]
    assert proof["questions"][0]["distance"] == pytest.approx(0, abs=1e-9)
    server.command(answers="nonsense")
    found = run(host, monkeypatch, questions=questions)
    assert "failed" in found, found
    server.process.kill()
    server.process.wait()


def test_a_sound_is_written_down(
    site: Path, host: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path_factory.mktemp("transcribe")
    server = up(site, home, **{"model": str(tiny_models.write(home, "transcribe")), "max-model-len": "auto"})
    gate = {"name": "chat", "url": f"http://127.0.0.1:{server.port}", "model": server.model}
    (host / "vllm/chat/7/gate.json").write_text(json.dumps(gate))
    (host / "sound.wav").write_bytes(sound_form.half_a_second())
    heard = {"name": "heard", "audio": str(host / "sound.wav"), "fields": {"language": "en"}}
    assert "failed" not in run(host, monkeypatch, questions=[{**heard, "matches": "^$"}])
    assert run(host, monkeypatch, questions=[{**heard, "matches": "hello"}])["failed"]
    missing = run(host, monkeypatch, questions=[{**heard, "audio": "/nonexistent.wav", "matches": "^$"}])
    assert "/nonexistent.wav cannot be read: No such file or directory" in missing["msg"]
    server.process.kill()
    server.process.wait()
