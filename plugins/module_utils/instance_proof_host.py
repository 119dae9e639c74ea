# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Asks the instances of a host what they have to prove before they get traffic, and keeps what the release before answered."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import instance_proof
from ansible_collections.gpufleet.llm.plugins.module_utils.files import read, write
from ansible_collections.gpufleet.llm.plugins.module_utils.instance_proof import Answer, AnswerError, Question
from ansible_collections.gpufleet.llm.plugins.module_utils.model_kinds_host import Instance
from ansible_collections.gpufleet.llm.plugins.module_utils.sound_form import form

RUNTIME = Path("/run/vllm")
# The operator's word on each instance, and what a turn keeps.
WORDS = Path("/var/lib/vllm-fleet")
KEPT = WORDS / "turn"


class NoPathError(Exception):
    """The instance has none of the paths that the question is asked at: its model is of another kind."""


def load(path: Path) -> dict[str, Any]:
    """A file of JSON; an absent or broken one is empty."""
    try:
        found = json.loads(read(path) or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


@dataclass
class Proof:
    """What became of an instance."""

    name: str
    warmed: dict[str, Any] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    # What speaks against traffic: of the warm-up, and of the questions.
    failures: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    # What was not asked, or could not be judged, and why.
    notes: list[str] = field(default_factory=list)

    def told(self) -> dict[str, Any]:
        """For the result of a module."""
        return {"name": self.name, "warm_up": self.warmed, "questions": self.answers, "notes": self.notes}


class Asker:
    """Asks one instance, as its current generation says it is asked, until a moment."""

    def __init__(self, name: str, config_path: str, key: str, seconds: float) -> None:
        self.name = name
        self.deadline = time.monotonic() + seconds
        self.seconds = seconds
        self.path = Path(config_path) / name
        gate = load(self.path / "current" / "gate.json")
        if not gate.get("url"):
            raise AnswerError(f"{self.path}/current does not say how it is asked: it has no generation")
        self.instance = Instance(str(gate["url"]), str(gate["model"]), key)

    def generation(self) -> str:
        """The generation that runs, as far as it is known."""
        running = read(RUNTIME / self.name / "generation").strip()
        try:
            return running or self.path.joinpath("current").readlink().name
        except OSError:
            return ""

    def ask(self, asked: Question) -> Answer:
        """One answer. Raises NoPathError, or AnswerError in words for a person."""
        for path in asked.paths:
            left = self.deadline - time.monotonic()
            if left <= 0:
                raise AnswerError(f"it was not asked: the {self.seconds:g} s for all prompts and questions were over")
            try:
                status, content = self.instance.request(path, left, *self.body(asked))
            except TimeoutError:
                raise AnswerError(f"{path}: no answer when the {self.seconds:g} s for all of them were over") from None
            except (OSError, http.client.HTTPException) as error:
                raise AnswerError(f"{path}: no answer ({error or type(error).__name__})") from None
            if not instance_proof.answers_path(status, content):
                continue
            text = content.decode(errors="replace")
            if status != http.client.OK:
                raise AnswerError(f"{path}: it answered HTTP {status}: {instance_proof.shown(text)}")
            try:
                return instance_proof.read(path, asked.body, json.loads(text))
            except AnswerError as error:
                raise AnswerError(f"{path}: {error}: {instance_proof.shown(text)}") from None
            except ValueError:
                raise AnswerError(f"{path}: it answered no JSON: {instance_proof.shown(text)}") from None
        raise NoPathError(f"it has no {' and no '.join(asked.paths)}")

    def body(self, asked: Question) -> tuple[bytes, str]:
        """The body of a request, and its content type."""
        fields = {"model": self.instance.model, **asked.body}
        if not asked.audio:
            return json.dumps(fields).encode(), "application/json"
        try:
            return form(fields, Path(asked.audio).read_bytes())
        except OSError as error:
            raise AnswerError(f"{asked.audio} cannot be read: {error.strerror}") from None


# --- before traffic


def warm_up(asker: Asker, prompts: Sequence[Question], proof: Proof) -> None:
    """Ask everything that is to be warm when traffic comes, each prompt as often and as many times at once as it says."""
    begun, seconds, count = time.monotonic(), [0.0], 0
    for prompt in prompts:
        if not prompt.concerns(asker.name):
            continue

        def once(_number: int, prompt: Question = prompt) -> float:
            started = time.monotonic()
            asker.ask(prompt)
            return time.monotonic() - started

        try:
            with ThreadPoolExecutor(max_workers=min(prompt.parallel, prompt.times)) as pool:
                took = list(pool.map(once, range(prompt.times)))
        except NoPathError as error:
            refuse(proof, prompt, f"warm-up: {prompt.name}: {error}")
            continue
        except AnswerError as error:
            proof.failures.append(f"warm-up: {prompt.name}: {error}")
            break
        seconds = took if not count else [*seconds, *took]
        count += len(took)
    proof.warmed = {
        "asked": count,
        "seconds": round(time.monotonic() - begun, 1),
        "first_seconds": round(seconds[0], 2),
        "last_seconds": round(seconds[-1], 2),
    }


def refuse(proof: Proof, asked: Question, text: str) -> None:
    """What the model is no kind for is wrong where the instance is named, and else meant for others."""
    if asked.instances:
        proof.failures.append(text)
    else:
        proof.notes.append(f"{text}; not asked")


def examine(asker: Asker, questions: Sequence[Question], proof: Proof) -> None:
    """Ask the questions one after the other: what an engine computes together with others differs in the last digits."""
    reference = load(reference_file(asker.name))
    for asked in questions:
        if not asked.concerns(asker.name):
            continue
        try:
            answer = asker.ask(asked)
        except NoPathError as error:
            refuse(proof, asked, f"{asked.name}: {error}")
            continue
        except AnswerError as error:
            proof.wrong.append(f"{asked.name}: {error}")
            proof.answers.append({"name": asked.name, "passed": False, "answer": ""})
            continue
        found = instance_proof.wrong(asked, answer)
        if found and asked.judged_key in (reference.get("wrong") or []):
            found[-1] += " (the release before answered it wrong, too: it may be a wrong question)"
        far: float | None = None
        if asked.max_distance is not None:
            far, text = judge_distance(asked, answer, reference, asker.generation(), proof)
            found += [text] if text else []
        proof.wrong += [f"{asked.name}: {text}" for text in found]
        said = instance_proof.shown(answer.text) if answer.text is not None else f"{len(answer.numbers)} numbers"
        result = {"name": asked.name, "passed": not found, "answer": said}
        proof.answers.append({**result, **({} if far is None else {"distance": round(far, 6)})})


def no_reference(asked: Question, reference: Mapping[str, Any], generation: str) -> str:
    """Why the release before is nothing to compare with; empty when it is."""
    if reference.get("wrong"):
        return "the release before answered other questions wrong"
    former = str(reference.get("generation") or "")
    if former.isdigit() and generation.isdigit() and int(generation) < int(former):
        # else nobody could go back from a release that answers nonsense
        return f"this goes back, from generation {former} to {generation}"
    if not (reference.get("answers") or {}).get(asked.key):
        return (reference.get("silent") or {}).get(asked.key) or "the release before was not asked it"
    return ""


def judge_distance(
    asked: Question, answer: Answer, reference: Mapping[str, Any], generation: str, proof: Proof
) -> tuple[float | None, str]:
    """The distance from the release before, and what is wrong; where that one is no reference there is nothing to judge."""
    if why := no_reference(asked, reference, generation):
        proof.notes.append(f"{asked.name}: its distance is not judged: {why}")
        return None, ""
    return instance_proof.too_far(asked, reference["answers"][asked.key], answer.numbers)


def prove(
    name: str, config_path: str, key: str, prompts: Sequence[Question], questions: Sequence[Question], seconds: float
) -> Proof:
    """Everything that an instance has to show before it gets traffic."""
    proof = Proof(name)
    try:
        asker = Asker(name, config_path, key, seconds)
    except AnswerError as error:
        proof.failures.append(str(error))
        return proof
    warm_up(asker, prompts, proof)
    if not proof.failures:
        examine(asker, questions, proof)
    return proof


# --- while the release before still serves


def reference_file(name: str) -> Path:
    """Where the answers of the release before are kept."""
    return KEPT / f"reference-{name}.json"


def in_turn(name: str) -> bool:
    """Whether a turn has taken the instance out already: what runs may be what is to be judged."""
    return bool(load(WORDS / f"{name}.json").get("turn"))


def confirmed(asker: Asker) -> bool:
    """Whether what runs has been gated, and so has served."""
    return (asker.path / asker.generation() / "confirmed").exists()


def remember(name: str, config_path: str, key: str, questions: Sequence[Question], seconds: float) -> dict[str, Any]:
    """Ask the release that serves what the next one is asked. Returns what became of it; nothing of it is an error.

    Its numbers are what the next one is compared with, and a question that it answers wrong may be a wrong question. What a turn that died had asked
    stays: what runs by now may be the new release.
    """
    told: dict[str, Any] = {"name": name, "asked": 0, "kept": False, "notes": []}
    concerned = [one for one in questions if one.concerns(name)]
    if not concerned:
        return told
    try:
        asker = Asker(name, config_path, key, seconds)
    except AnswerError:
        return told  # nothing was ever there
    there = reference_file(name).exists()
    if there and (in_turn(name) or not confirmed(asker)):
        return {**told, "kept": True}
    answers: dict[str, list[float]] = {}
    silent: dict[str, str] = {}
    wrong: list[str] = []
    for asked in concerned:
        try:
            answer = asker.ask(asked)
        except NoPathError:
            continue
        except AnswerError as error:
            silent[asked.key] = f"the release before did not answer it ({error})"
            told["notes"].append(f"{asked.name}: {error}")
            continue
        answers[asked.key] = list(answer.numbers) if asked.max_distance is not None else []
        if found := instance_proof.wrong(asked, answer):
            wrong.append(asked.judged_key)
            told["notes"] += [f"{asked.name}: {text}; is it the right question?" for text in found]
    if there and not answers:
        return {**told, "kept": True}
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    content = {"generation": asker.generation(), "at": at, "answers": answers, "silent": silent, "wrong": wrong}
    reference_file(name).parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    write(reference_file(name), json.dumps(content) + "\n", 0o600)
    return {**told, "asked": len(answers)}
