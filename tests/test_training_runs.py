"""Whole training runs: their result, their log, interruption and resumption, and bad input."""

import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace

import pytest
import torch

from attnlab import cli
from attnlab.model.config import HybridConfig
from attnlab.model.hybrid import HybridLM
from attnlab.training import checkpoints
from attnlab.training.config import TrainConfig
from attnlab.training.data import read_corpus
from attnlab.training.guard import NonFiniteError
from attnlab.training.log import read_log
from attnlab.training.options import field_helps
from attnlab.training.tokenizer import load_tokenizer
from attnlab.training.train import resume, train
from attnlab.training.trainer import Trainer
from tests.documents import write_documents

SMALL = replace(
    HybridConfig.tiny(),
    hidden_size=32,
    intermediate_size=32,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    num_hidden_layers=3,
    layer_types=("linear_attention", "full_attention", "linear_attention"),
    rotary_dim=8,
)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with 40 short documents of English-like words."""
    return str(write_documents(tmp_path_factory.mktemp("corpus"), 200))


def settings(out, folder, **changes):
    small = {"batch_tokens": 512, "pack_len": 256, "seq_len": 128, "steps": 8, "warmup_steps": 2}
    rest = {"validation_tokens": 2048, "validation_share": 0.1}
    given = {"out": str(out), "corpus": (folder,), **small, **rest, **changes}
    return TrainConfig(**given)


def steps_of(out):
    return [line for line in read_log(out / "log.jsonl") if line["event"] == "step"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_lowers_the_validation_loss_and_leaves_a_model_with_its_tokenizer(
    dtype, corpus, tmp_path
):
    config = settings(tmp_path / "run", corpus, steps=40, dtype=dtype, learning_rate=1e-2)
    result = train(config, model_config=SMALL)
    log = read_log(tmp_path / "run" / "log.jsonl")
    first, last = (
        next(line for line in order if line["event"] == "validation")
        for order in (log, reversed(log))
    )
    assert first["step"] == 0 and last["step"] == 40 == result.step
    assert last["bits_per_byte"] < 0.6 * first["bits_per_byte"]
    assert last["loss"] == result.validation.nats
    assert [line["step"] for line in steps_of(tmp_path / "run")] == list(range(1, 41))

    model = HybridLM.from_pretrained(result.model_path)
    assert next(model.parameters()).dtype == getattr(torch, dtype)
    record = json.loads((result.model_path / "tokenizer_config.json").read_text())
    assert record["tokenizer_class"] == "attnlab.ByteTokenizer"


def test_a_run_with_a_tokenizer_file_counts_bits_by_the_byte_and_keeps_the_file(corpus, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    engine = tokenizers.Tokenizer(tokenizers.models.BPE())
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=60, special_tokens=["</s>"], show_progress=False
    )
    engine.train([f"{corpus}/{i:02}.txt" for i in range(40)], trainer)
    path = tmp_path / "tokenizer.json"
    engine.save(str(path))
    given = {"tokenizer": str(path), "steps": 1, "size": "tiny", "vocab_size": 64}
    result = train(settings(tmp_path / "run", corpus, **given))

    assert HybridLM.from_pretrained(result.model_path).config.vocab_size == 64
    tokenizer = load_tokenizer(result.model_path)
    assert tokenizer.engine.to_str() == engine.to_str() and tokenizer.eos_token_id == 0
    _, held_out = read_corpus([corpus], tokenizer, validation_share=0.1)
    bytes_a_token = held_out.sizes.sum() / held_out.num_targets
    assert bytes_a_token > 2
    bits = result.validation.nats / math.log(2) / bytes_a_token
    assert result.validation.bits_per_byte == pytest.approx(bits, rel=1e-9)

    with pytest.raises(ValueError, match=f"at most the 40 ids .* got {tokenizer.vocab_size} in"):
        train(settings(tmp_path / "other", corpus, **{**given, "vocab_size": 40}))


def test_a_log_line_says_what_the_step_did(corpus, tmp_path):
    given = {"linear_ramp": (0.25, 0.0, 0.5), "learning_rate": 2e-3}
    train(settings(tmp_path, corpus, **given), model_config=SMALL)
    lines = steps_of(tmp_path)
    assert [line["tokens"] for line in lines] == [512 * i for i in range(1, 9)]
    multipliers = [line["linear_multiplier"] for line in lines]
    assert multipliers == pytest.approx([0.4375, 0.625, 0.8125, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert lines[0]["learning_rate"] == pytest.approx(1e-3)  # half of the peak, of 2 warm-up steps
    for line in lines:
        assert math.isfinite(line["loss"]) and line["grad_norm"] > 0 and line["tokens_per_s"] > 0


@pytest.mark.parametrize("log_every", [1, 4])
def test_a_run_that_meets_a_nan_names_step_and_layer_and_keeps_the_last_checkpoint(
    log_every, corpus, tmp_path, monkeypatch
):
    plain, calls = Trainer.step, []

    def planting(trainer, *args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            with torch.no_grad():
                trainer.model.get_submodule("model.layers.1.self_attn.o_proj").weight[3, 4] = (
                    math.nan
                )
        return plain(trainer, *args, **kwargs)

    monkeypatch.setattr(Trainer, "step", planting)
    config = settings(tmp_path, corpus, checkpoint_every=5, log_every=log_every)
    message = (
        r"step 6: the output of model\.layers\.1\.self_attn\.o_proj is not finite; "
        r"the last checkpoint is of step 5"
    )
    with pytest.raises(NonFiniteError, match=message):
        train(config, model_config=SMALL)
    assert [line["step"] for line in steps_of(tmp_path)] == [1, 2, 3, 4, 5]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000005.pt"]
    state = checkpoints.load_checkpoint(tmp_path / "checkpoints")
    assert all(p.isfinite().all() for p in state["optimizer"]["masters"].values())
    monkeypatch.undo()
    assert resume(tmp_path).step == 8


def test_a_run_that_fails_before_its_first_checkpoint_is_resumed_from_the_start(
    corpus, tmp_path, monkeypatch
):
    plain, calls = Trainer.step, []

    def failing(trainer, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError
        return plain(trainer, *args, **kwargs)

    monkeypatch.setattr(Trainer, "step", failing)
    with pytest.raises(MemoryError):
        train(settings(tmp_path, corpus), model_config=SMALL)
    losses = [line["loss"] for line in steps_of(tmp_path)]
    monkeypatch.undo()
    assert resume(tmp_path).step == 8
    lines = [(line["event"], line["step"]) for line in read_log(tmp_path / "log.jsonl")]
    steps = [("step", step) for step in range(1, 9)]
    assert lines == [("validation", 0), *steps, ("validation", 8)]
    assert [line["loss"] for line in steps_of(tmp_path)[:3]] == losses


def start_run(out, *arguments):
    command = [sys.executable, "-m", "attnlab.cli", "train", "--out", str(out), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(process, out, step):
    """Return once the log holds a step, so that a signal meets the run in its midst."""
    log, deadline = out / "log.jsonl", time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and any(line["step"] >= step for line in read_log(log)):
            return
        time.sleep(0.01)
    raise AssertionError(f"no step {step}: {process.communicate()[1]}")


def finish(process, code):
    output, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    return output


def test_a_run_interrupted_and_killed_ends_with_the_bits_of_an_undisturbed_one(corpus, tmp_path):
    arguments = (
        "--corpus {} --device cpu --size tiny --steps 24 --batch-tokens 512 --pack-len 256 "
        "--seq-len 128 --checkpoint-every 5 --validate-every 12 --validation-tokens 512"
    )
    arguments = arguments.format(corpus).split()
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(start_run(whole, *arguments), 0)

    first = start_run(broken, *arguments)
    wait_for_step(first, broken, 2)
    first.send_signal(signal.SIGINT)
    assert "go on with: attnlab train --resume" in finish(first, 130)
    after_signal = checkpoints.load_checkpoint(broken / "checkpoints")["step"]
    assert steps_of(broken)[-1]["step"] == after_signal < 24

    second = start_run(broken, "--resume")
    wait_for_step(second, broken, max(after_signal, 10) + 2)
    second.kill()
    finish(second, -signal.SIGKILL)
    assert not (broken / "model").exists()
    finish(start_run(broken, "--resume"), 0)

    states = [checkpoints.load_checkpoint(out / "checkpoints") for out in (whole, broken)]
    flat = [dict(tensors_of(state)) for state in states]
    assert flat[0].keys() == flat[1].keys() and len(flat[0]) > 100
    assert [name for name in flat[0] if not torch.equal(flat[0][name], flat[1][name])] == []
    weights = [(out / "model" / "model.safetensors").read_bytes() for out in (whole, broken)]
    assert weights[0] == weights[1]
    timeless = [
        [
            {k: v for k, v in line.items() if k != "tokens_per_s"}
            for line in read_log(o / "log.jsonl")
        ]
        for o in (whole, broken)
    ]
    assert timeless[0] == timeless[1]
    assert [line["step"] for line in steps_of(broken)] == list(range(1, 25))


def tensors_of(state, path=""):
    if isinstance(state, dict):
        for key, value in state.items():
            yield from tensors_of(value, f"{path}/{key}")
    elif isinstance(state, torch.Tensor):
        yield path, state


# Bad input


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"variant": "mamba"}, "variant among hybrid, softmax, lightning, got mamba"),
        ({"size": "7b"}, "size among tiny, 3m, 15m, 100m, got 7b"),
        ({"batch_tokens": 1000}, "batch_tokens that are packs of 256, got 1000"),
        ({"batch_tokens": 0}, "batch_tokens that are packs of 256, got 0"),
        ({"steps": 0}, "steps of at least 1, got 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints of at least 1, got 0"),
        ({"validation_share": 1.0}, "validation_share of at least 0 and below 1, got 1.0"),
        ({"learning_rate": -1.0}, "learning_rate above 0, got -1.0"),
        ({"linear_ramp": (0.0, 0.8, 0.2)}, "linear_ramp .* got .0.0, 0.8, 0.2."),
        ({"vocab_size": 256}, "at most the 256 ids of the model's vocabulary, got 259 in bytes"),
        ({"pack_len": 2**20, "batch_tokens": 2**20}, "corpus of at least 1048576 tokens"),
        ({"corpus": ("/nowhere/at/all",)}, "readable corpus, got /nowhere/at/all"),
        ({"tokenizer": "/nowhere.json"}, 'expected "bytes" or the path'),
        ({"device": "cuda:99"}, "a device that this machine has, got cuda:99"),
    ],
    ids=lambda x: str(x)[:40] if isinstance(x, dict) else "",
)
def test_a_setting_that_can_not_be_meant_is_refused_before_any_work(
    changes, message, corpus, tmp_path
):
    with pytest.raises(ValueError, match=message):
        train(settings(tmp_path / "run", corpus, **changes))
    assert not (tmp_path / "run").exists()


def test_a_run_is_neither_overwritten_nor_resumed_with_another_corpus(corpus, tmp_path):
    out, texts = tmp_path / "run", tmp_path / "texts"
    texts.mkdir()
    for i in range(4):
        (texts / f"{i}").write_text(f"document {i} " * 100)
    train(settings(out, str(texts), steps=1), model_config=SMALL)
    with pytest.raises(ValueError, match=r"a folder without a run, got .*run"):
        train(settings(out, str(texts), steps=1), model_config=SMALL)
    (texts / "0").write_text("something else " * 100)
    with pytest.raises(ValueError, match=r"the corpus that the run in .* began with"):
        resume(out)
    with pytest.raises(ValueError, match=r"a run to resume in .*texts"):
        resume(texts)


# Command line


def test_each_setting_is_an_option_with_a_help():
    assert field_helps().keys() == {field.name for field in fields(TrainConfig)}
    assert all(field_helps().values())


def test_a_wrong_command_line_ends_with_one_clear_line(capsys, tmp_path):
    assert cli.main(["train", "--resume", "--out", str(tmp_path)]) == 2
    assert "attnlab train: error: expected a run to resume" in capsys.readouterr().err
    assert cli.main(["train", "--resume", "--out", str(tmp_path), "--steps", "5"]) == 2
    assert "to differ in a resumed run, got ['steps']" in capsys.readouterr().err
    assert cli.main(["train", "--out", str(tmp_path), "--corpus", str(tmp_path)]) == 2
    assert "expected a corpus with text in it" in capsys.readouterr().err
