"""Long-context benchmarks of language models on anything that generates: RULER's scoring, MR-NIAH.

Nothing here comes with data or with scores. `run` reads a file of questions a line, lets a function
answer them, and goes on where an earlier call was interrupted; the scores follow the benchmarks' rules:

- RULER (arXiv 2404.06654): the share of references that occur in the response, whatever their case,
  or whether any of them does, in percent.
- MR-NIAH (MiniMax-01, arXiv 2501.08313): dialogues whose last turn asks for an earlier answer again;
  the share of the answer's key phrases that occur in the response, 0 for one that refuses.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnlab.checks import expect
from attnlab.inference.generate import generate
from attnlab.model.hybrid import HybridLM
from attnlab.training.tokenizer import Tokenizer

REFUSALS = ("sorry", "no previous conversation")
Generator = Callable[[str], str]


def string_match_all(responses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean share of each question's references that occur in its response, in percent.

    For RULER's needles, variable tracking and aggregation.

    Raises:
        ValueError: for no questions, a question without references, or unequal numbers of both.
    """
    _check(responses, references)
    shares = [
        sum(r.lower() in response.lower() for r in refs) / len(refs)
        for response, refs in zip(responses, references, strict=True)
    ]
    return 100 * sum(shares) / len(shares)


def string_match_part(responses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of questions of which any reference occurs in the response, in percent.

    For RULER's question answering. Errors as `string_match_all`.
    """
    _check(responses, references)
    hits = [
        any(r.lower() in response.lower() for r in refs)
        for response, refs in zip(responses, references, strict=True)
    ]
    return 100 * sum(hits) / len(hits)


def mr_niah_score(response: str, phrases: Sequence[str]) -> float:
    """Share of the key phrases that occur in a response, from 0 to 1; 0 for one that refuses.

    Raises:
        ValueError: without phrases.
    """
    expect(bool(phrases), "at least one key phrase", list(phrases))
    if any(word in response.lower() for word in REFUSALS):
        return 0.0
    return sum(phrase in response for phrase in phrases) / len(phrases)


@dataclass(frozen=True, kw_only=True)
class Question:
    """One line of a benchmark: what is put to the model, and what the response is judged by.

    `group` is what scores are reported by, such as a length.
    """

    prompt: str
    references: tuple[str, ...]
    group: str


def read_ruler(path: Path) -> list[Question]:
    """Questions of one of RULER's `validation.jsonl` files: `input`, `outputs`, `length`.

    Raises:
        ValueError: with the line, for one that is no such record.
    """
    return [
        Question(
            prompt=_text(record, "input", where),
            references=tuple(map(str, _list(record, "outputs", where))),
            group=str(record.get("length", path.stem)),
        )
        for record, where in _records(path)
    ]


def read_mr_niah(
    path: Path, phrases: Mapping[str, Sequence[str]], *, turn: str = "{role}: {content}\n"
) -> list[Question]:
    """Questions of an MR-NIAH file: `messages` (role, content), `label`, `length_class`.

    `phrases` maps a label, the answer that is asked for, to its key phrases; a label that it lacks is
    its own single phrase. A dialogue is laid out by `turn`, and the assistant's is begun.

    Raises:
        ValueError: with the line, for one that is no such record.
    """
    questions = []
    for record, where in _records(path):
        label = _text(record, "label", where)
        turns = []
        for message in _list(record, "messages", where):
            if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
                raise ValueError(f"expected role and content in each message, got {where}")
            turns.append(turn.format(role=message["role"], content=message["content"]))
        begun = turn.format(role="assistant", content="").rstrip()
        questions.append(
            Question(
                prompt="".join(turns) + begun,
                references=tuple(phrases.get(label, [label])),
                group=str(record.get("length_class", path.stem)),
            )
        )
    return questions


def run(questions: Sequence[Question], answer: Generator, out: Path) -> list[str]:
    """Responses to all questions, kept in the file `out`, a JSON line each, as they come.

    What `out` holds already isn't asked again. `answer` maps a prompt to a response.

    Raises:
        ValueError: if `out` holds responses to other questions.
    """
    responses = _earlier(questions, out)
    with out.open("a", encoding="utf-8") as file:
        for number in range(len(responses), len(questions)):
            response = answer(questions[number].prompt)
            line = {"number": number, "group": questions[number].group, "response": response}
            file.write(json.dumps({**line, "prompt_len": len(questions[number].prompt)}) + "\n")
            file.flush()
            os.fsync(file.fileno())
            responses.append(response)
    return responses


def scores(
    questions: Sequence[Question],
    responses: Sequence[str],
    rule: Callable[[Sequence[str], Sequence[Sequence[str]]], float] = string_match_all,
) -> dict[str, tuple[float, int]]:
    """Score and number of questions by group, in the order of first appearance."""
    groups: dict[str, list[int]] = {}
    for number, question in enumerate(questions):
        groups.setdefault(question.group, []).append(number)
    return {
        group: (
            rule([responses[i] for i in own], [questions[i].references for i in own]),
            len(own),
        )
        for group, own in groups.items()
    }


def mr_niah(responses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean `mr_niah_score`: a rule for `scores`."""
    _check(responses, references)
    pairs = zip(responses, references, strict=True)
    return sum(mr_niah_score(*pair) for pair in pairs) / len(responses)


def greedy_answers(
    model: HybridLM, tokenizer: Tokenizer, *, max_new_tokens: int, chunk_size: int | None = None
) -> Generator:
    """One of our models as a function from prompt to response, the likeliest token at a time."""

    def answer(prompt: str) -> str:
        ids = tokenizer.encode(prompt)
        new = generate(model, [ids], max_new_tokens=max_new_tokens, chunk_size=chunk_size)
        return tokenizer.decode(new[0])

    return answer


def _check(responses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    expect(len(responses) == len(references), f"{len(references)} responses", len(responses))
    expect(bool(responses), "at least one question", "none")
    expect(all(map(len, references)), "references to every question", "a question without")


def _records(path: Path) -> Iterable[tuple[dict[str, Any], str]]:
    """The JSON objects of a file and where each stands.

    The end of a line is a newline alone: text may hold other separators.
    """
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            where = f"line {number} of {path}"
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"expected a JSON object, got {where}: {error}") from None
            if not isinstance(record, dict):
                raise ValueError(f"expected a JSON object, got {where}")
            yield record, where


def _text(record: dict[str, Any], name: str, where: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise ValueError(f"expected text under {name!r}, got {value!r} in {where}")
    return value


def _list(record: dict[str, Any], name: str, where: str) -> list[Any]:
    value = record.get(name)
    if not isinstance(value, list) or not value:
        raise ValueError(f"expected a list under {name!r}, got {value!r} in {where}")
    return value


def _earlier(questions: Sequence[Question], out: Path) -> list[str]:
    """Responses that a file holds; a line that a killed run left half written is cut off."""
    if not out.exists():
        return []
    data = out.read_bytes()
    if not data.endswith(b"\n"):
        out.write_bytes(data[: data.rfind(b"\n") + 1])
    responses = []
    for number, (record, where) in enumerate(_records(out)):
        fits = number < len(questions) and record.get("number") == number
        if not fits or record.get("prompt_len") != len(questions[number].prompt):
            raise ValueError(f"expected responses to the same questions, got {where}")
        responses.append(_text(record, "response", where))
    return responses
