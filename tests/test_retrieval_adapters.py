"""Adapters of RULER and MR-NIAH on small files: readers, rules, and runs that go on."""

import json

import pytest
import torch

from attnlab.model import HybridConfig, HybridLM
from attnlab.retrieval.adapters import (
    Question,
    greedy_answers,
    mr_niah,
    mr_niah_score,
    read_mr_niah,
    read_ruler,
    run,
    scores,
    string_match_all,
    string_match_part,
)
from attnlab.training.tokenizer import ByteTokenizer


def write_lines(path, *records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    return path


def test_match_all_is_the_mean_share_of_references_whatever_their_case():
    responses = ["It is 123, and Blue.", "none"]
    assert string_match_all(responses, [["123", "BLUE", "7"], ["None", "9"]]) == pytest.approx(
        100 * (2 / 3 + 1 / 2) / 2
    )


def test_match_part_needs_one_reference():
    assert string_match_part(["in PARIS", "nowhere"], [["paris", "rome"], ["oslo"]]) == 50.0


@pytest.mark.parametrize("rule", [string_match_all, string_match_part, mr_niah])
@pytest.mark.parametrize(
    ("responses", "references", "message"),
    [([], [], "at least one question"), (["a"], [], "0 responses"), (["a"], [[]], "references to")],
    ids=["none", "unequal", "without"],
)
def test_rules_refuse_what_cannot_be_scored(rule, responses, references, message):
    with pytest.raises(ValueError, match=message):
        rule(responses, references)


def test_mr_niah_counts_phrases_and_refusals_as_nothing():
    assert mr_niah_score("waves and penguins", ["penguins", "ice"]) == 0.5
    assert mr_niah_score("Sorry, but penguins and ice", ["penguins", "ice"]) == 0.0
    assert mr_niah_score("There is No previous conversation.", ["previous"]) == 0.0
    with pytest.raises(ValueError, match="at least one key phrase"):
        mr_niah_score("a", [])


def test_rulers_files_are_read(tmp_path):
    path = write_lines(
        tmp_path / "validation.jsonl",
        {"index": 0, "input": "What is it?\u2028", "outputs": ["5", 7], "length": 4096},
        {"index": 1, "input": "And?", "outputs": ["x"]},
    )
    assert read_ruler(path) == [
        Question(prompt="What is it?\u2028", references=("5", "7"), group="4096"),
        Question(prompt="And?", references=("x",), group="validation"),
    ]


def test_dialogues_are_read_and_the_reply_is_begun(tmp_path):
    messages = [{"role": "user", "content": "A poem."}, {"role": "assistant", "content": "Ice."}]
    path = write_lines(
        tmp_path / "2048.jsonl",
        {"messages": messages, "label": "Ice.", "length_class": 2048},
        {"messages": messages, "label": "other"},
    )
    one, other = read_mr_niah(path, {"Ice.": ["Ice", "."]})
    assert one.prompt == "user: A poem.\nassistant: Ice.\nassistant:"
    assert one.references == ("Ice", ".") and one.group == "2048"
    assert other.references == ("other",)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "expected a JSON object, got line 1"),
        ("[]", "expected a JSON object, got line 1"),
        ('{"input": 3}', "expected text under 'input', got 3 in line 1"),
        ('{"input": "a", "outputs": "b"}', "expected a list under 'outputs'"),
        ('{"input": "a", "outputs": []}', "expected a list under 'outputs'"),
    ],
)
def test_lines_that_are_no_records_are_named(line, message, tmp_path):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        read_ruler(tmp_path / "a.jsonl")


def test_messages_without_a_role_are_named(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"messages": [{"content": "x"}], "label": "x"})
    with pytest.raises(ValueError, match="role and content"):
        read_mr_niah(path, {})


def questions():
    return [Question(prompt=f"q{i}", references=(f"a{i}",), group=str(i % 2)) for i in range(4)]


def test_an_interrupted_run_asks_only_what_is_left(tmp_path):
    asked = []

    def answer(prompt):
        if prompt == "q2" and len(asked) < 3:
            asked.append("interrupted")
            raise KeyboardInterrupt
        asked.append(prompt)
        return prompt.replace("q", "a")

    out = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(questions(), answer, out)
    with out.open("a") as file:
        file.write('{"number": 2, "resp')
    responses = run(questions(), answer, out)
    assert responses == ["a0", "a1", "a2", "a3"]
    assert asked == ["q0", "q1", "interrupted", "q2", "q3"]
    assert scores(questions(), responses) == {"0": (100.0, 2), "1": (100.0, 2)}
    assert scores(questions(), ["a0", "", "", "a3"], mr_niah) == {"0": (0.5, 2), "1": (0.5, 2)}


def test_responses_to_other_questions_are_refused(tmp_path):
    run(questions(), str.upper, tmp_path / "out.jsonl")
    others = [Question(prompt="longer", references=("a",), group="0")]
    with pytest.raises(ValueError, match="responses to the same questions"):
        run(others, str.upper, tmp_path / "out.jsonl")


def test_our_models_answer_greedily():
    torch.manual_seed(0)
    model = HybridLM(HybridConfig.tiny()).eval()
    answer = greedy_answers(model, ByteTokenizer(), max_new_tokens=3, chunk_size=4)
    whole = greedy_answers(model, ByteTokenizer(), max_new_tokens=3)
    assert answer("A needle in a haystack") == whole("A needle in a haystack")
