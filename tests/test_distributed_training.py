"""`attnlab train` on ranks: the figures of one process, resumption elsewhere, a lost rank, bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
import torch
from distributed_runs import run_resume, run_train

from attnlab.distributed.checkpoint import list_sharded
from attnlab.distributed.launch import LOST
from attnlab.model.config import HybridConfig
from attnlab.model.hybrid import HybridLM
from attnlab.training.config import TrainConfig
from attnlab.training.log import read_log
from attnlab.training.tokenizer import load_tokenizer
from attnlab.training.train import resume, train
from tests.documents import write_documents

KINDS = "linear_attention", "full_attention"
SMALL = replace(
    HybridConfig.tiny(),
    hidden_size=32,
    intermediate_size=16,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_hidden_layers=4,
    layer_types=(KINDS[0], KINDS[1], KINDS[0], KINDS[0]),
    rotary_dim=4,
)
# Float32 sums in another order; later steps are measured on weights that differ by as much.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with 40 short documents of English-like words."""
    return write_documents(tmp_path_factory.mktemp("corpus"), 150)


def settings(out, corpus, **changes):
    small = {"batch_tokens": 512, "pack_len": 128, "seq_len": 100, "steps": 4, "warmup_steps": 2}
    rest = {"validation_tokens": 640, "validation_share": 0.1, "lightning_backend": "torch"}
    often = {"checkpoint_every": 2, "validate_every": 2}
    return {"out": str(out), "corpus": (str(corpus),), **small, **rest, **often, **changes}


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """Folder of the run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train(TrainConfig(**settings(out, corpus)), model_config=SMALL)
    return out


def check_same(out, alone):
    """The log's figures, and the exported weights."""
    logs = [read_log(folder / "log.jsonl") for folder in (out, alone)]
    assert [(x["event"], x["step"]) for x in logs[0]] == [(x["event"], x["step"]) for x in logs[1]]
    for line, wanted in zip(*logs, strict=True):
        assert line["loss"] == pytest.approx(wanted["loss"], rel=TOLERANCE)
        if line["event"] == "validation":
            octaves = [[x["start"], x["targets"], x["nats"]] for x in line["by_position"]]
            for found, right in zip(octaves, wanted["by_position"], strict=True):
                assert found[:2] == [right["start"], right["targets"]]
                assert found[2] == pytest.approx(right["nats"], rel=10 * TOLERANCE)
        else:
            assert line["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=10 * TOLERANCE)
    models = [HybridLM.from_pretrained(folder / "model") for folder in (out, alone)]
    assert models[0].config == models[1].config
    for found, right in zip(models[0].parameters(), models[1].parameters(), strict=True):
        # AdamW moves a weight by up to a rate of 4e-3 a step where its gradient is a rounding.
        assert (found - right).abs().mean() < 1e-5
    assert load_tokenizer(out / "model").name == load_tokenizer(alone / "model").name


@pytest.mark.parametrize(
    "mesh",
    [
        {"dp": 2, "cp": 2},
        {"cp": 2, "tp": 2, "ep": 2, "etp": 2, "zigzag": True},
        {"ep": 4, "num_groups": 3},
    ],
    ids=str,
)
def test_a_run_on_ranks_has_the_figures_of_one_process(mesh, worlds, corpus, alone, tmp_path):
    out = tmp_path / "run"
    for result in worlds(4).call(run_train, settings(out, corpus, **mesh), SMALL):
        assert result.step == 4 and result.model_path == out / "model"
    check_same(out, alone)
    assert [path.name[-1] for path in list_sharded(out / "checkpoints")] == ["2", "4"]


def test_a_run_on_one_rank_has_the_figures_of_one_process(worlds, corpus, alone, tmp_path):
    worlds(1).call(run_train, settings(tmp_path / "run", corpus), SMALL)
    check_same(tmp_path / "run", alone)


def test_a_run_that_broke_off_goes_on_on_other_meshes_to_the_same_figures(
    worlds, corpus, alone, tmp_path
):
    out = tmp_path / "run"
    given = settings(out, corpus, dp=2, cp=2, ep=2, etp=2)
    assert worlds(4).call(run_train, given, SMALL, fails_at=4) == [None] * 4
    assert [line["step"] for line in read_log(out / "log.jsonl")][-1] == 3
    kept = tmp_path / "kept"
    shutil.copytree(out, kept)
    place = {"dp": None, "cp": 2, "ep": 1, "etp": 1}
    assert [r.step for r in worlds(2).call(run_resume, out, **place)] == [4, 4]
    check_same(out, alone)
    assert worlds(1).call(run_resume, kept, **dict.fromkeys(("cp", "ep", "etp"), 1), dp=None)
    check_same(kept, alone)


def test_bfloat16_layers_are_exported_as_they_were_trained(worlds, corpus, tmp_path):
    given = settings(tmp_path / "run", corpus, cp=2, dtype="bfloat16", steps=1)
    worlds(2).call(run_train, given, SMALL)
    model = HybridLM.from_pretrained(tmp_path / "run" / "model")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_the_first_layer_that_is_not_finite_is_named_on_all_ranks(worlds, corpus, tmp_path):
    given = settings(tmp_path / "run", corpus, cp=2)
    words = worlds(2).call(run_train, given, SMALL, nan_at=(0, 4))  # rank 1 meets it in a state
    what = "step 4: the output of model.layers.2.input_layernorm is not finite"
    assert words == [f"NonFiniteError: {what}; the last checkpoint is of step 2"] * 2
    assert [r.step for r in worlds(2).call(run_resume, tmp_path / "run")] == [4, 4]


# Bad input


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"cp": 3}, "expected 2 ranks as dp 1 x cp 3 x tp 1, got 3"),
        ({"ep": 3}, "expected ep x etp that divides the 2 ranks, got 3 x 1"),
        ({"cp": 0}, "expected cp of at least 1, got 0"),
        ({"batch_tokens": 384}, "expected batch_tokens of packs in a multiple of dp 2, got 3 of"),
        ({"cp": 2, "pack_len": 1}, "expected pack_len of at least 2 tokens for cp 2, got 1"),
        ({"compile": True}, "expected no compile on ranks"),
        ({"softmax_backend": "sdpa"}, "expected no softmax_backend on ranks, got sdpa"),
        ({"corpus": ("/nowhere/at/all",)}, "expected a readable corpus"),
    ],
    ids=lambda x: str(x)[:40] if isinstance(x, dict) else "",
)
def test_what_ranks_can_not_do_is_refused_on_all_of_them(
    changes, message, worlds, corpus, tmp_path
):
    given = settings(tmp_path / "run", corpus) | changes
    words = worlds(2).call(run_train, given, SMALL)
    assert words[0] == words[1] and words[0].startswith("ValueError: " + message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "mesh, model, message",
    [
        ({"tp": 2}, {"num_attention_heads": 3, "num_key_value_heads": 3}, "heads that tp 2"),
        ({"ep": 2}, {"num_local_experts": 3}, "experts that ep 2"),
        ({"etp": 2}, {"intermediate_size": 15}, "channels of an expert that etp 2"),
    ],
)
def test_a_model_that_ranks_do_not_divide_is_refused_on_all(
    mesh, model, message, worlds, corpus, tmp_path
):
    given = settings(tmp_path / "run", corpus, **mesh)
    words = worlds(2).call(run_train, given, replace(SMALL, **model))
    assert words[0] == words[1] and f"expected a number of {message} divides" in words[0]
    assert not (tmp_path / "run").exists()


def test_ranks_with_other_corpora_or_settings_are_refused(worlds, corpus, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(corpus, other)
    (other / "00.txt").write_text("something else " * 99)
    given = settings(tmp_path / "run", corpus, cp=2)
    for change, what in (({"corpus": (str(other),)}, "corpus"), ({"seed": 5}, "settings")):
        words = worlds(2).call(run_train, [given, given | change], SMALL)
        assert (
            words
            == [
                f"ValueError: expected the same {what} on all ranks of world, got others "
                "on ranks [1]"
            ]
            * 2
        )
    assert not (tmp_path / "run").exists()


def test_checkpoints_of_one_process_and_of_ranks_are_not_mixed_up(worlds, corpus, alone, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(alone, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    words = worlds(2).call(run_resume, out, cp=2)
    assert words[0] == words[1] and "of one process: go on without torchrun" in words[0]
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    for path in (out / "checkpoints").iterdir():
        path.unlink()
    assert worlds(2).call(run_resume, out, cp=2)[0].step == 4  # from the start
    with pytest.raises(ValueError, match="of a job: go on with torchrun"):
        resume(out)


def test_one_process_refuses_a_mesh(corpus, tmp_path):
    with pytest.raises(ValueError, match=r"torchrun, which starts the ranks .* got {'cp': 2}"):
        train(TrainConfig(**settings(tmp_path / "run", corpus, cp=2)), model_config=SMALL)
    assert not (tmp_path / "run").exists()


# Jobs as users run them


def start_job(size, out, *options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(size), "-m", "attnlab.cli", "train", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*command, *options], text=True, env=environment, **pipes)


def wait_for_step(process, out, step):
    log, deadline = out / "log.jsonl", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and any(line["step"] >= step for line in read_log(log)):
            return
        time.sleep(0.02)
    process.kill()
    raise AssertionError(f"no step {step}: {process.communicate()[1]}")


def rank_of(process):
    return process.environ().get("RANK")


def test_a_job_stopped_and_one_that_lost_a_rank_go_on_to_the_losses_of_an_undisturbed_run(
    corpus, tmp_path
):
    words = (
        "--device cpu --size tiny --steps 12 --batch-tokens 256 --pack-len 128 --seq-len 64 "
        "--warmup-steps 2 --checkpoint-every 2 --validate-every 6 --validation-tokens 256 "
        "--learning-rate 1e-3 --lightning-backend torch"
    )
    options = ["--corpus", str(corpus), *words.split()]
    out = tmp_path / "run"

    first = start_job(2, out, *options, "--dp", "2", "--ep", "2")
    wait_for_step(first, out, 1)
    first.send_signal(signal.SIGINT)
    output, errors = first.communicate(timeout=120)
    assert first.returncode != 0 and output.count("stopped after step") == 1, errors
    stopped = int(list_sharded(out / "checkpoints")[-1].name.removeprefix("step-"))
    assert read_log(out / "log.jsonl")[-1]["step"] == stopped < 12

    second = start_job(2, out, "--resume", "--dp", "1", "--cp", "2", "--ep", "1")
    wait_for_step(second, out, max(stopped, 2) + 1)
    (lost,) = (p for p in psutil.Process(second.pid).children() if rank_of(p) == "1")
    lost.send_signal(signal.SIGKILL)
    output, errors = second.communicate(timeout=120)
    assert second.returncode != 0 and errors.count(LOST) == 1, errors
    assert not (out / "model").exists()
    kept = int(list_sharded(out / "checkpoints")[-1].name.removeprefix("step-"))
    assert stopped <= kept < 12

    third = start_job(1, out, "--resume", "--dp", "1", "--ep", "1")
    output, errors = third.communicate(timeout=120)
    assert third.returncode == 0, errors
    assert f"trained 12 steps; the model is in {out / 'model'}" in output
    given = json.loads((out / "run.json").read_text())["train"]
    given |= {"out": str(tmp_path / "alone"), "dp": None, "ep": 1, "corpus": tuple(given["corpus"])}
    train(TrainConfig(**given))
    check_same(out, tmp_path / "alone")


def test_bad_input_of_a_job_is_told_once_and_ends_all_ranks_with_code_2(corpus, tmp_path):
    job = start_job(2, tmp_path / "run", "--corpus", str(corpus), "--device", "cpu", "--cp", "3")
    _, errors = job.communicate(timeout=120)
    assert job.returncode != 0
    assert errors.count("error: expected 2 ranks as dp 1 x cp 3 x tp 1, got 3") == 1
    assert "exitcode  : 2" in errors and not (tmp_path / "run").exists()
