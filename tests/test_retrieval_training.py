"""The small models' training: its data, its plan, runs that resume, and that it learns."""

import json
import math
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attnlab.model import HybridLM
from attnlab.model.config_json import FULL, LINEAR
from attnlab.retrieval import plans, train
from attnlab.retrieval.batch import ABSENT
from attnlab.retrieval.mixture import (
    WEIGHTS,
    Curriculum,
    Mixture,
    training_shape,
    validation_batches,
)
from attnlab.retrieval.models import KINDS, RAMP, VARIANTS, model_of, start_as_shifts
from attnlab.retrieval.plans import PLANS, Session, best_rates, run_plan
from attnlab.retrieval.runs import Run, Trained, read_trained
from attnlab.retrieval.streaming import absorb, streamed_logits, tail_logits
from attnlab.retrieval.symbols import Vocabulary
from attnlab.training.log import read_log

pytestmark = pytest.mark.usefixtures("one_thread")
V = Vocabulary(num_keys=16, num_values=16, num_noise=16)
TINY = Run(
    name="tiny",
    model="hybrid-3to1",
    size="small",
    vocabulary=V,
    tasks=("needle", "multi_query"),
    steps=16,
    batch_tokens=256,
    learning_rate=2e-3,
    warmup_steps=2,
    curriculum=Curriculum(shortest=16, stages=((0.5, 32), (1.0, 64))),
    dtype="float32",
    validation_rows=4,
    validation_lengths=(64,),
)


@pytest.mark.parametrize("size", ["3m", "small"])
def test_all_architectures_are_equal_in_size(size):
    names = [k for k in KINDS if size == "3m" or k != "hybrid-7to1"]
    counts = [model_of(n, vocab_size=776, size=size).config.num_parameters() for n in names]
    # Widths come in steps of 8, which is more of a small model.
    assert max(counts) / min(counts) < (1.01 if size == "3m" else 1.03)
    assert size == "small" or 2e6 < counts[0] < 3e6


def test_layers_and_ramps_are_what_names_say():
    full = {n: model_of(n, vocab_size=776) for n in KINDS}
    counts = {n: m.config.layer_types.count(FULL) for n, m in full.items()}
    expected = {"softmax": 8, "lightning": 0, "hybrid-7to1": 1, "hybrid-3to1": 2, "hybrid-1to1": 4}
    assert counts == expected
    assert full["hybrid-7to1"].config.layer_types[-1] == FULL
    assert {n: m.linear_ramp for n, m in full.items() if "hybrid" not in n} == {
        "softmax": None,
        "lightning": None,
    }
    assert full["hybrid-3to1"].linear_ramp == RAMP
    first = model_of("hybrid-7to1.softmax-first", vocab_size=776)
    assert first.config.layer_types == (FULL, *[LINEAR] * 7) and first.linear_ramp is None
    own = model_of("hybrid-7to1.minimax", vocab_size=776).config
    assert (own.rotary_dim, own.conv_width, own.qk_norm, own.log_length_scale) == (
        16,
        0,
        False,
        False,
    )


@pytest.mark.parametrize("name", ["gru", "softmax.", "hybrid-2to1", "softmax.no-ramps"])
def test_unknown_models_are_refused(name):
    with pytest.raises(ValueError, match="expected one of softmax, lightning"):
        model_of(name, vocab_size=776)


def test_convolutions_start_as_shifts_by_none_and_by_one():
    model = HybridLM(model_of("hybrid-3to1", vocab_size=64, size="small").config)
    start_as_shifts(model)
    mixer = model.model.layers[0].self_attn
    taps = mixer.conv.weight.detach()  # [D, 4]
    assert torch.equal(taps.abs().argmax(1), torch.tensor([3, 2] * 32))
    assert float(taps.max()) > 0.9 and len(taps.unique(dim=0)) == 64


def test_every_variant_is_a_model():
    for variant in filter(None, VARIANTS):
        assert model_of(f"hybrid-7to1.{variant}", vocab_size=776).config.num_parameters() > 2e6


def mixture(**flags):
    flags = {"data": "symbols", "batch_tokens": 512, "seed": 0, "vocabulary": V} | flags
    return Mixture(**{"curriculum": TINY.curriculum, "device": "cpu", **flags})


def test_batches_follow_from_seed_and_step_and_grow_as_the_curriculum_says():
    one, other = mixture(), mixture(seed=1)
    lengths = {step: one.batch(step, 40).input_ids.shape[1] for step in range(1, 41)}
    assert {n for step, n in lengths.items() if step <= 20} == {16, 32}
    assert {n for step, n in lengths.items() if step > 20} == {16, 32, 64}
    assert torch.equal(one.batch(7, 40).input_ids, one.batch(7, 40).input_ids)
    assert not torch.equal(one.batch(7, 40).input_ids, other.batch(7, 40).input_ids)


def test_a_batch_holds_every_task_that_fits_its_length():
    """At 256 tokens all seven: their markers are in the tails."""
    whole = mixture(
        batch_tokens=256 * 16,
        vocabulary=Vocabulary(),
        curriculum=Curriculum(shortest=256, stages=((1.0, 256),)),
    )
    batch = whole.batch(1, 10)
    assert set(batch.input_ids[:, -128:].flatten().tolist()) >= {1, 2, 3, 4, 5}
    assert batch.asked.max() == 255 and (batch.asked == ABSENT).any()


@pytest.mark.parametrize("length", [16, 24, 64, 256, 1000])
def test_the_questions_of_training_always_fit(length):
    """All that training may draw for a length can be made: no step of a long run ends in an error."""
    for task in WEIGHTS:
        for seed in range(20):
            shape = training_shape(task, length, V, random.Random(seed))
            if shape is not None:
                part = mixture(
                    tasks=(task,), curriculum=Curriculum(shortest=length, stages=((1.0, length),))
                )
                part = replace(part, batch_tokens=length, seed=seed)
                assert part.batch(1, 1).input_ids.shape == (1, length)


def test_text_and_mqar_are_data_too():
    text = torch.randint(97, 122, (4000,), dtype=torch.uint8)
    curriculum = Curriculum(shortest=256, stages=((1.0, 512),))
    of_text = mixture(data="text", corpus=text, curriculum=curriculum, batch_tokens=1024)
    assert of_text.batch(1, 4).joint in (5, 7)
    batches = [of_text.batch(step, 64) for step in range(1, 65)]
    needles = {(x.input_ids.shape[1], x.asked.shape[1] // x.joint) for x in batches}
    # From the start several at a time: of one alone a model learns no more than to copy it.
    assert needles == {(256, 1), (256, 2), (512, 1), (512, 2), (512, 3), (512, 4)}
    names = set(validation_batches(of_text, rows=2, lengths=[512]))
    assert names == {"number@512", "pass_key@512"}
    sized = Vocabulary(num_keys=8182, num_values=1, num_noise=1)
    of_pairs = mixture(data="mqar", vocabulary=sized, curriculum=TINY.curriculum)
    of_pairs = replace(of_pairs, curriculum=Curriculum(shortest=64, stages=((1.0, 64),)))
    assert of_pairs.batch(1, 4).asked.shape == (8, 4)
    assert set(validation_batches(of_pairs, rows=2, lengths=[128])) == {"mqar@128"}


@pytest.mark.parametrize(
    ("stages", "message"),
    [(((0.5, 64),), "shares rise to 1"), (((1.0, 8),), "lengths of at least 16")],
)
def test_a_curriculum_that_does_not_end_is_refused(stages, message):
    with pytest.raises(ValueError, match=message):
        Curriculum(shortest=16, stages=stages)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"data": "audio"}, "data among symbols"),
        ({"tasks": ("copy",)}, "tasks among needle"),
        ({"dtype": "float16"}, "a dtype among"),
        ({"steps": 0}, "steps of at least 1"),
        ({"batch_tokens": 32}, "batch_tokens >= 64, got 32"),
        ({"model": "hybrid"}, "expected one of softmax"),
    ],
    ids=lambda x: str(x) if isinstance(x, str) else "",
)
def test_runs_that_cannot_be_meant_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **flags)


def weights(folder):
    model = HybridLM.from_pretrained(folder / "model")
    return torch.cat([p.flatten() for p in model.parameters()])


def test_a_run_that_was_interrupted_ends_with_the_same_bits(tmp_path):
    whole = train.train(TINY, tmp_path / "whole", device="cpu")
    assert whole is not None
    past = time.monotonic() - 1
    parts = 0
    while train.train(TINY, tmp_path / "parts", device="cpu", deadline=past) is None:
        parts += 1
    assert parts >= 3
    assert torch.equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    lines = [read_log(tmp_path / name / "log.jsonl") for name in ("whole", "parts")]
    losses = [[line.get("loss") for line in log] for log in lines]
    assert losses[0] == losses[1] and len(losses[0]) > 4
    again = train.train(TINY, tmp_path / "whole", device="cpu")
    assert again == whole and not (tmp_path / "whole" / "checkpoints").exists()


def test_a_folder_with_another_run_is_refused(tmp_path):
    past = time.monotonic() - 1
    assert train.train(TINY, tmp_path, device="cpu", deadline=past) is None
    with pytest.raises(ValueError, match="expected the run tiny or none"):
        train.train(replace(TINY, learning_rate=1e-3), tmp_path, device="cpu")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="settings of a run"):
        train.train(TINY, tmp_path, device="cpu")


def test_a_loss_that_is_no_number_ends_the_run_with_its_step(tmp_path):
    with pytest.raises(FloatingPointError, match="tiny: loss or gradient is not finite, step 2"):
        train.train(replace(TINY, learning_rate=1e30), tmp_path, device="cpu")


def test_bfloat16_trains_with_float32_masters(tmp_path):
    trained = train.train(replace(TINY, dtype="bfloat16"), tmp_path, device="cpu")
    model = HybridLM.from_pretrained(tmp_path / "model")
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert trained.num_parameters == model.num_parameters()
    assert json.loads((tmp_path / "run.json").read_text())["accuracies"] == trained.accuracies


def test_a_tiny_softmax_model_learns_to_copy_a_value(tmp_path):
    """Sequences of 16 tokens, one to three pairs of 8 keys; chance is 1 in 8."""
    small = Vocabulary(num_keys=8, num_values=8, num_noise=4)
    run = replace(
        TINY,
        model="softmax",
        vocabulary=small,
        steps=80,
        batch_tokens=512,
        learning_rate=4e-3,
        curriculum=Curriculum(shortest=16, stages=((1.0, 16),)),
        validation_rows=32,
        validation_lengths=(16,),
    )
    trained = train.train(run, tmp_path, device="cpu")
    assert trained.score > 0.6


def made_up(run, score):
    return Trained(run=run, accuracies={"a": score}, seconds=1.0, num_parameters=1)


def test_the_second_stage_takes_the_rate_that_did_best():
    plan = PLANS["full"]
    first = plan.first_stage()
    assert len(first) == 20 and len({run.name for run in first}) == 20
    found = [made_up(run, 1.0 if run.learning_rate == 1e-3 else 0.5) for run in first]
    assert best_rates(found) == dict.fromkeys(KINDS, 1e-3)
    second = plan.second_stage(found)
    assert {run.learning_rate for run in second if run.data == "symbols"} == {1e-3}
    rates = Counter(run.model for run in second if run.data == "mqar")
    assert set(rates) == set(plans.MQAR_MODELS) and set(rates.values()) == {3}
    seeds = [run.model for run in second if run.seed == 1]
    assert seeds == list(KINDS)
    assert {run.data for run in second} == {"symbols", "mqar", "text"}
    assert not {run.name for run in first} & {run.name for run in second}


def test_processes_end_at_about_the_same_time():
    plan = PLANS["full"]
    runs = plan.second_stage([made_up(run, 1.0) for run in plan.first_stage()])
    dealt = plans.shares(runs, 5)
    assert sorted(run.name for share in dealt for run in share) == sorted(run.name for run in runs)
    steps = [sum(run.steps for run in share) for share in dealt]
    assert max(steps) - min(steps) <= max(run.steps for run in runs) // 2  # the longest is no tail
    assert max(dealt[0], key=lambda run: run.steps) == dealt[0][0]
    assert [len(share) for share in plans.shares(runs[:2], 5)] == [1, 1]


def test_a_run_is_read_back_as_it_was():
    for plan in PLANS.values():
        for run in plan.first_stage():
            assert Run.from_json(json.loads(json.dumps(run.to_json()))) == run


@pytest.fixture
def tiny_plan(monkeypatch):
    plan = replace(PLANS["small"], base=TINY, kinds=("softmax", "hybrid-3to1"), rates=(1e-3, 2e-3))
    monkeypatch.setitem(PLANS, "tiny", plan)
    return plan


def test_a_plan_trains_all_its_runs_and_only_once(tiny_plan, tmp_path):
    session = Session(plan="tiny", out=str(tmp_path), device="cpu", steps=2)
    assert run_plan(session)
    names = {path.name for path in tmp_path.iterdir()}
    assert len(names) == 5 and sum("no-ramp" in name for name in names) == 1
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/run.json")}
    assert run_plan(session)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/run.json")}


def test_a_plan_stops_at_its_deadline_and_goes_on(tiny_plan, tmp_path):
    session = Session(plan="tiny", out=str(tmp_path), device="cpu", steps=2)
    assert not run_plan(replace(session, deadline=time.time() - 1))
    assert len(list(tmp_path.glob("*/checkpoints"))) == 1
    assert run_plan(session)


def test_bad_sessions_are_refused(tmp_path):
    for flags, message in (({"plan": "big"}, "a plan among"), ({"jobs": 0}, "jobs >= 1")):
        with pytest.raises(ValueError, match=message):
            Session(**{"plan": "small", "out": str(tmp_path), "device": "cpu", **flags})


@pytest.mark.parametrize("name", ["softmax", "lightning", "hybrid-3to1", "hybrid-3to1.half-rotary"])
def test_streamed_logits_are_those_of_one_pass(name):
    """Chunks of any size, in float64: what the last layer skips was not wanted."""
    torch.manual_seed(0)
    config = model_of(name, vocab_size=64, size="small").config
    model = HybridLM(config, dtype=torch.float64).eval()
    ids = torch.randint(64, (2, 301))
    with torch.no_grad():
        whole = model(ids).logits[:, -7:]
        assert torch.allclose(tail_logits(model, ids, 7), whole, rtol=1e-9, atol=1e-9)
    for chunk in (2, 100, 134, 10_000):
        streamed = streamed_logits(model, ids, 7, chunk=chunk)
        assert torch.allclose(streamed, whole, rtol=1e-6, atol=1e-6), chunk


def test_what_is_absorbed_can_be_decoded_from():
    torch.manual_seed(0)
    config = model_of("hybrid-3to1", vocab_size=64, size="small").config
    model = HybridLM(config, dtype=torch.float64).eval()
    ids = torch.randint(64, (2, 40))
    cache = model.new_cache(2, 40)
    absorb(model, cache, ids[:, :39])
    with torch.no_grad():
        expected = model(ids).logits[:, -1]
    assert cache.host_lengths == [39, 39]
    assert torch.allclose(model(ids[:, 39:], cache=cache).logits[:, -1], expected, atol=1e-6)
    with pytest.raises(ValueError, match="at most 40 tokens"):
        absorb(model, cache, ids[:, :1])


def test_ids_outside_the_vocabulary_are_refused_before_any_work():
    config = model_of("softmax", vocab_size=64, size="small").config
    with pytest.raises(ValueError, match="ids in"):
        streamed_logits(HybridLM(config).eval(), torch.full((1, 10), 64), 2)


def test_the_command_stops_in_time_and_two_processes_go_on(tmp_path):
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "attnlab.cli", "retrieval", "--plan", "small", "--device"]
    command += ["cpu", "--steps", "2", "--out", str(tmp_path / "runs")]
    stopped = subprocess.run(
        [*command, "--minutes", "1e-9"], cwd=root, capture_output=True, text=True
    )
    assert stopped.returncode == 130 and "go on with the same command" in stopped.stdout
    shared = [*command, "--jobs", "2"]
    done = subprocess.run(shared, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "softmax-lr0.002-seed0" in done.stdout
    bad = subprocess.run([*command, "--minutes", "-1"], cwd=root, capture_output=True, text=True)
    assert bad.returncode == 2 and "minutes > 0" in bad.stderr
    assert len(plans.trained_in(tmp_path / "runs")) == 4
    assert math.isfinite(read_trained(tmp_path / "runs" / "softmax-lr0.002-seed0").score)
