"""Measuring whole models: a short run as a user starts it, what it counts, and what its gate catches."""

import itertools
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attnlab.model import HybridLM
from bench import bench_model, model_calls, model_engines, models, plan, sweep, timing
from bench.inputs import Source
from bench.lines import by_configuration, lines_of
from bench.model_costs import Work
from bench.model_parts import PARTS, PartTimer
from bench.rows import load_rows
from bench.worker import Task, measure_point

ROOT = Path(__file__).resolve().parent.parent
SOURCE = Source("text")
CEILINGS = timing.Ceilings(copy_gbps=10.0, matmul_tflops=0.1)


def point(pass_, model="hybrid-tiny", length=200, **changes):
    arguments = bench_model.parse_arguments(["--smoke", "--device", "cpu"])
    size, kind = model.rpartition("-")[2], "transformers" if "transformers" in model else "hybrid"
    found = bench_model.point_of(arguments, "cpu", size, kind, pass_, length, 1)
    return replace(found, **changes)


def run(*options):
    command = [sys.executable, str(ROOT / "bench/bench_model.py"), "--device", "cpu"]
    return subprocess.run([*command, *map(str, options)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder of a short run."""
    folder = tmp_path_factory.mktemp("model") / "run"
    # On a busy machine the default budgets skip points; these are only limits.
    result = run("--smoke", "--budget", 900, "--point-budget", 300, "--out", folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def quick(monkeypatch):
    """Ceilings that are given and not measured."""
    monkeypatch.setattr(timing, "measure_ceilings", lambda *_: CEILINGS)


def test_a_short_run_measures_three_stacks_and_transformers(finished):
    rows = load_rows(finished / "rows.jsonl")
    assert all(row["status"] == "ok" and row["suite"] == "model" for row in rows)
    ours = {(op, "attnlab", p) for op in models.STACKS for p in ("prefill", "decode", "train")}
    theirs = {("hybrid", "transformers", p) for p in ("prefill", "decode")}
    assert {(row["op"], row["backend"], row["pass"]) for row in rows} == ours | theirs
    for row in rows:
        assert 0 < row["error_ratio"] <= 1 and row["peak_bytes"] > 0
        tokens = 1 if row["pass"] == "decode" else row["q_len"]
        assert row["tokens_per_s"] == pytest.approx(tokens / row["ms_median"] * 1e3)
        assert row["share_of_limit"] == pytest.approx(row["floor_ms"] / row["ms_median"])
        assert row["versions"]["transformers"] and row["ceilings"] and row["pred_ms"] > 0
        if row["pass"] == "prefill" and row["backend"] == "attnlab":
            assert set(row["parts_ms"]) == set(PARTS) and min(row["parts_ms"].values()) >= 0
            assert len(row["new_tokens"][0]) == model_calls.NEW_TOKENS


def test_every_field_of_a_row_is_documented(finished):
    text = (ROOT / "results/README.md").read_text()
    names = {name for row in load_rows(finished / "rows.jsonl") for name in row}
    assert {name for name in names if f"`{name}`" not in text} == set()


def test_the_report_shows_models_together_and_where_time_goes(finished):
    rows = load_rows(finished / "rows.jsonl")
    (group,) = by_configuration(rows)
    names = [line.name for line in lines_of(group, "prefill")]
    stacks = ["hybrid attnlab", "hybrid transformers", "lightning attnlab", "softmax attnlab"]
    assert names == stacks
    drawn = {path.name for path in (finished / "figures").iterdir()}
    assert drawn == {"throughput.png", "time.png", "memory.png", "share.png", "parts.png"}
    assert "size tiny" in (finished / "summary.md").read_text()


def test_a_resumed_run_measures_nothing_again(finished, quick, capsys):
    before = (finished / "rows.jsonl").read_text()
    assert bench_model.main(["--smoke", "--device", "cpu", "--out", str(finished), "--resume"]) == 0
    assert (finished / "rows.jsonl").read_text() == before


def test_what_the_budget_does_not_allow_is_a_row_with_its_prediction(tmp_path, quick):
    options = [
        "--smoke",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "run"),
        "--point-budget",
        "0.001",
    ]
    assert bench_model.main(options) == 1
    rows = load_rows(tmp_path / "run/rows.jsonl")
    assert len(rows) == 11 and {row["status"] for row in rows} == {"skipped_budget"}
    assert all(row["reason"] and row["pred_ms"] > 0 and row["pred_bytes"] > 0 for row in rows)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--size", "7b"], "expected sizes among tiny, 3m, 15m, 100m, 1b, got '7b'"),
        (["--models", "mamba"], "expected models among softmax, lightning, hybrid, transformers"),
        (["--passes", "fwd"], "expected passes among prefill, decode, train, got 'fwd'"),
        (["--max-len", "4G"], "expected a length such as 64K"),
        (
            ["--models", "transformers", "--passes", "train"],
            "expected passes that transformers has",
        ),
        (["--budget", "0"], "expected --budget > 0, got 0"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_input_ends_with_one_line_and_code_2(options, message, tmp_path, capsys):
    arguments = ["--smoke", "--device", "cpu", "--out", str(tmp_path / "run"), *options]
    assert bench_model.main(arguments) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_lengths_go_up_by_fours_and_end_with_the_longest():
    assert bench_model.lengths(1024, 16384) == [1024, 4096, 16384]
    assert bench_model.lengths(2048, 1 << 22)[-3:] == [1 << 19, 1 << 21, 1 << 22]


def planned(options):
    lists = sweep.plan_points(sweep.parse_arguments(options), "cpu")
    return list(itertools.chain.from_iterable(lists))


def test_a_sweep_ends_with_models_if_asked():
    options = ["--max-len", "32K", "--device", "cpu", "--models", "tiny,3m"]
    points = planned(options)
    suites = [point.suite for point in points]
    ops = suites.count("ops")
    assert suites == ["ops"] * ops + ["model"] * (len(suites) - ops)
    found = {(p.model.rpartition("-")[2], p.q_len, p.pass_) for p in points[ops:]}
    lengths = (1 << 10, 1 << 12, 1 << 14)
    assert found == set(itertools.product(("tiny", "3m"), lengths, ("prefill", "decode")))
    assert all(point.suite == "ops" for point in planned(options[:4]))


def test_the_comparison_config_has_a_billion_parameters_in_every_stack():
    counts = [models.config_of(f"{stack}-1b").num_parameters() for stack in models.STACKS]
    assert all(abs(count - 1.09e9) < 0.01 * 1.09e9 for count in counts)


@pytest.mark.parametrize("model", ["hybrid-tiny", "transformers-hybrid-tiny"])
def test_counted_operations_are_those_of_the_model(model):
    built = HybridLM(models.config_of(model), device="meta")
    assert Work(point("prefill", model)).flops("prefill") == built.prefill_flops(200)
    four = Work(point("decode", model, batch=4))
    assert four.flops("decode") == 4 * built.decode_flops(200)


def test_a_training_step_counts_three_passes_with_all_logits():
    model = HybridLM(models.config_of("hybrid-tiny"), device="meta")
    other_logits = 199 * 2 * 320 * 64
    assert Work(point("train")).flops("train") == 3 * (model.prefill_flops(200) + other_logits)


def test_least_bytes_of_a_step_are_those_that_a_token_meets():
    model = HybridLM(models.config_of("hybrid-tiny"), device="meta")
    met = 0
    for name, weight in model.named_parameters():
        share = 2 / 4 if ".experts." in name else 1 / 320 if "embed_tokens" in name else 1
        met += round(weight.numel() * share) * 4
    states = model.cache_bytes(0)
    assert Work(point("decode")).min_bytes("decode") == met + model.cache_bytes(200) + states


@pytest.mark.parametrize("chunk", [64, 1 << 17])
def test_a_right_prefill_passes_whole_and_in_chunks(monkeypatch, chunk):
    for module in (model_calls, model_engines):
        monkeypatch.setattr(module, "CHUNK", chunk)
    call = model_calls.prepare(point("prefill"), SOURCE, "cpu")
    verdict = call.check()
    assert 0 < verdict.worst.ratio < 0.1
    whole = models.build("hybrid-tiny", torch.float32, "cpu")(
        model_calls.token_ids(point("prefill"), SOURCE, 200, "cpu"), logits_to_keep=1
    ).logits
    # Another order of float32 sums, through eight layers.
    torch.testing.assert_close(call.run(), whole, rtol=1e-4, atol=1e-4)


def shifted(function):
    """The function with its result one token late, as an index that is off by one gives it."""

    def late(*args, **flags):
        result = function(*args, **flags)
        if isinstance(result, torch.Tensor):
            return result.roll(1, 2)
        return result._replace(output=result.output.roll(1, 2))

    return late


@pytest.mark.parametrize("op", ["lightning_attention", "softmax_attention"])
def test_the_gate_catches_a_mixer_that_is_off_by_a_token(monkeypatch, op):
    import attnlab.model.attention as mixers

    call = model_calls.prepare(point("prefill"), SOURCE, "cpu")
    with monkeypatch.context() as patch:
        patch.setattr(mixers, op, shifted(getattr(mixers, op)))
        results = call.compute()
    assert call.judge(results).worst.ratio > 100


def test_the_gate_catches_a_state_that_a_chunk_loses(monkeypatch):
    monkeypatch.setattr(model_calls, "CHUNK", 128)
    call = model_calls.prepare(point("prefill"), SOURCE, "cpu")
    extend = model_engines.extend

    def forgetful(model, cache, ids, parts, keep):
        if parts[0].start:
            for layer in cache.layers[:1]:
                layer.state.zero_()
        return extend(model, cache, ids, parts, keep)

    with monkeypatch.context() as patch:
        patch.setattr(model_calls, "extend", forgetful)
        results = call.compute()
    assert call.judge(results).worst.ratio > 10


@pytest.mark.parametrize("model", ["hybrid-tiny", "transformers-hybrid-tiny"])
def test_the_gate_catches_steps_at_wrong_positions(monkeypatch, model):
    call = model_calls.prepare(point("decode", model), SOURCE, "cpu")
    assert call.check().worst.ratio < 0.1
    context = call.run.args[0]
    context.length -= 1  # steps write over the last token
    results = call.compute()
    context.length += 1
    assert call.judge(results).worst.ratio > 10


def test_the_gate_catches_other_weights_in_transformers():
    call = model_calls.prepare(point("prefill", "transformers-hybrid-tiny"), SOURCE, "cpu")
    peer = call.run.func.__self__.model
    with torch.no_grad():
        peer.model.layers[3].mlp.gate.weight.neg_()
    verdict = call.check()
    models.build_peer.cache_clear()
    assert verdict.worst.ratio > 10


@pytest.mark.parametrize(("dtype", "right", "wrong"), [("float32", 0.1, 10), ("bfloat16", 1, 2)])
def test_the_gate_catches_a_gradient_that_is_missing(monkeypatch, dtype, right, wrong):
    call = model_calls.prepare(point("train", dtype=dtype), SOURCE, "cpu")
    results = call.compute()
    assert call.judge(results).worst.ratio < right
    import attnlab.model.attention as mixers

    lightning = mixers.lightning_attention_varlen

    def keyless(query, key, *args, **flags):
        if flags["backend"] is None:  # what is timed, not the definition
            key = key.detach()
        return lightning(query, key, *args, **flags)

    monkeypatch.setattr(mixers, "lightning_attention_varlen", keyless)
    assert call.judge(results).worst.ratio > wrong
    assert call.judge({"loss": torch.tensor(float("nan"))}).worst.ratio == float("inf")


def test_a_training_step_leaves_the_weights_as_they_are():
    call = model_calls.prepare(point("train"), SOURCE, "cpu")
    first, second = call.run(), call.run()
    assert first.item() > 0 and torch.equal(first, second)


def test_a_timed_step_starts_from_the_same_context_each_time():
    call = model_calls.prepare(point("decode"), SOURCE, "cpu")
    context = call.run.args[0]
    for _ in range(3 * model_calls.KEPT):  # more than the cache has room for
        call.run()
    assert context.cache.host_lengths == [201] and context.cache.lengths.tolist() == [201]


def test_repeated_contexts_keep_the_tokens_in_order():
    x = torch.arange(6.0).view(1, 1, 3, 2)
    assert model_engines.repeated(x, 5)[0, 0, :, 0].tolist() == [0, 2, 4, 0, 2]


def test_without_transformers_its_row_says_so(monkeypatch):
    monkeypatch.setattr(model_calls.importlib.util, "find_spec", lambda name: None)
    task = Task(point("prefill", "transformers-hybrid-tiny"), SOURCE, CEILINGS, 1.0)
    row = measure_point(task)
    assert (row["status"], row["reason"]) == ("unsupported", "transformers is not installed")


def test_half_precision_training_is_not_offered():
    row = measure_point(Task(point("train", dtype="float16"), SOURCE, CEILINGS, 1.0))
    assert row["status"] == "unsupported" and "float16" in row["reason"]


def test_parts_add_up_and_a_slow_part_shows():
    model = models.build("hybrid-tiny", torch.float32, "cpu")
    ids = model_calls.token_ids(point("prefill"), SOURCE, 64, "cpu")
    slow = model.model.layers[2].mlp.gate.register_forward_hook(lambda *_: time.sleep(0.2))
    start = time.perf_counter()
    with PartTimer(model, "cpu") as timer, torch.no_grad():
        model(ids)
    took = (time.perf_counter() - start) * 1e3
    slow.remove()
    parts = timer.ms()
    assert sum(parts.values()) == pytest.approx(took, rel=0.05)
    assert parts["experts"] > 200 and 0 <= parts["rest"] < parts["experts"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_changed_model_is_another_point():
    names = plan.SOURCES["attnlab"]
    assert {"attnlab/model", "attnlab/cache.py", "attnlab/inference"} <= set(names)
    assert all((ROOT / name).exists() for name in names)
    assert len({plan.fingerprint(name) for name in ("attnlab", "transformers", "torch")}) == 3


def test_the_manifest_says_how_it_was_run(finished):
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["finished"] and manifest["settings"]["size"] == "tiny"
    assert manifest["ceilings"]["float32"]["copy_gbps"] > 0
