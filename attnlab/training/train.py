"""Training of a lab model: what `attnlab train` does, to be read from top to bottom.

A run lives in one folder:
    run.json        its settings, the model's config, the fingerprint of its corpus
    log.jsonl       a line a step and a line a validation
    checkpoints/    the last few states, float32 masters included
    model/          at the end: weights, config and tokenizer, as `attnlab generate` reads them

A step is a function of its number and of the state before it: learning rate, packs and multiplier
follow from the number alone; masters, AdamW's moments and the random generators are the state. So
on a CPU (with the same number of threads) a run that was killed and resumed ends with the same bits
as one that was not.

The ranks of a job under torchrun all do what is written here, in step: the trainer spreads each step
over them, rank 0 alone writes the log and what is not sharded, and checkpoints are folders that any
number of ranks can go on from. Such a run has one process's losses but for the order of sums.
"""

import json
import math
import time
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnlab.checks import expect
from attnlab.distributed.launch import Job
from attnlab.model.config import HybridConfig
from attnlab.model.hybrid import HybridLM
from attnlab.training.checkpoints import write_atomically
from attnlab.training.config import MESH, PLACE, TrainConfig, check_vocabulary, lab_model
from attnlab.training.data import read_corpus
from attnlab.training.guard import NonFiniteError, StopSignal
from attnlab.training.log import Record, RunLog
from attnlab.training.objective import Validation
from attnlab.training.packing import Pack, PackedCorpus
from attnlab.training.progress import Progress
from attnlab.training.schedule import learning_rate_factor, linear_multiplier
from attnlab.training.spread import check_ranks, trainer_of
from attnlab.training.tokenizer import Tokenizer, load_tokenizer


class TrainResult(NamedTuple):
    """What a run has come to.

    step: optimiser steps done.
    out: folder of the run.
    model_path: folder of the trained model; None if a signal ended the run before its last step.
    validation: after the last step; None likewise.
    """

    step: int
    out: Path
    model_path: Path | None
    validation: Validation | None


def train(
    config: TrainConfig, *, model_config: HybridConfig | None = None, job: Job | None = None
) -> TrainResult:
    """Train a new model in the folder `config.out`.

    `model_config` is for a model other than that of `config.size` and `config.variant`, `job` for
    training on its ranks, all of which have to call this and have to see the folder.

    Raises:
        ValueError: before any work, for a folder that holds a run, a corpus that can't be read or
            is too short, a tokenizer whose vocabulary exceeds the model's, or ranks among which
            model and packs can't be spread.
        NonFiniteError: with the step and the layer; the last checkpoint stays.
        OSError: if a checkpoint can't be written; the one before stays.
    """
    if job is not None:
        config = replace(config, out=job.of_first(config.out))  # its name may hold the time
    out = Path(config.out)
    if (out / "run.json").exists():
        raise ValueError(f"expected a folder without a run, got {out}: resume it or choose another")
    tokenizer = load_tokenizer(config.tokenizer)
    run = _Run(config, model_config or lab_model(config, tokenizer), tokenizer, job)
    record = {
        "train": asdict(config),
        "model": run.model_config.to_dict(),
        "corpus": run.fingerprint,
    }
    if run.trainer.leads:
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, indent=2) + "\n"
        write_atomically(out / "run.json", lambda path: path.write_text(text))
    return run.execute()


def resume(out: str | Path, *, job: Job | None = None, **place: Any) -> TrainResult:
    """Go on with the run in a folder after its last checkpoint, with the settings it began with.

    `place` are settings among `PLACE`, which may differ: a job can go on with other ranks.

    Raises:
        ValueError: if there is no run, its corpus has changed, or a checkpoint is damaged; and
            what `train` raises.
    """
    others = sorted(place.keys() - set(PLACE))
    expect(not others, f"only {', '.join(PLACE)} to differ in a resumed run", others)
    path = Path(out) / "run.json"
    try:
        record = json.loads(path.read_text())
        settings = record["train"] | {"out": str(out)}
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"expected a run to resume in {out}, got {error!r}") from None
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    device = {} if job is None else {"device": job.device_type}
    config = TrainConfig(**settings | device | place)
    model_config = HybridConfig.from_dict(record["model"])
    run = _Run(config, model_config, load_tokenizer(config.tokenizer), job)
    if run.fingerprint != record["corpus"]:
        raise ValueError(f"expected the corpus that the run in {out} began with, got another")
    return run.execute()


class _Run:
    """A run in memory: its data, its trainer, and how many steps are done."""

    def __init__(
        self,
        config: TrainConfig,
        model_config: HybridConfig,
        tokenizer: Tokenizer,
        job: Job | None,
    ) -> None:
        self.config, self.model_config = config, model_config
        self.tokenizer, self.out = tokenizer, Path(config.out)
        check_vocabulary(tokenizer, model_config.vocab_size)
        self._read_corpus()
        check_ranks(config, job, validation_len=self.validation_data.pack_len)
        meshes = None
        if job is not None:
            # Also waits until every rank has looked for a run in the folder.
            job.check_same(_settings_of(config), "settings")
            job.check_same(self.fingerprint, "corpus")
            meshes = job.meshes(**{axis: getattr(config, axis) for axis in MESH})
        self.trainer = trainer_of(config, self._new_model(), meshes)
        self.step, self.saved_step = 0, -1  # -1: nothing is saved

    def _read_corpus(self) -> None:
        """Packs to train on and to validate on."""
        config = self.config
        training, self.held_out = read_corpus(
            config.corpus, self.tokenizer, validation_share=config.validation_share
        )
        self.fingerprint = training.fingerprint() + self.held_out.fingerprint()
        self.data = PackedCorpus(
            training, pack_len=config.pack_len, seq_len=config.seq_len, seed=config.seed
        )
        # Its seed is fixed, so that runs of all seeds are judged on the same packs.
        self.validation_data = PackedCorpus(
            self.held_out,
            pack_len=min(config.pack_len, self.held_out.num_targets),
            seq_len=config.seq_len,
            seed=0,
        )

    def _new_model(self) -> HybridLM:
        config = self.config
        torch.manual_seed(config.seed)
        device = torch.device(config.device)
        model = HybridLM(self.model_config, device=device, dtype=torch.float32)
        model.use_backend(lightning=config.lightning_backend, softmax=config.softmax_backend)
        model.gradient_checkpointing = config.gradient_checkpointing
        if config.compile:
            for layer in model.model.layers:
                layer.compile()
        return model

    def execute(self) -> TrainResult:
        """All steps that are left, and the model's folder at their end."""
        config, validation = self.config, None
        self._restore()
        leads = self.trainer.leads
        path = self.out / "log.jsonl" if leads else None
        with (
            closing(RunLog(path, step=self.saved_step)) as self.log,
            Progress(step=self.step, steps=config.steps, quiet=not leads) as self.progress,
            StopSignal() as stop,
        ):
            if self.step == 0:
                self._validate()
            self._open_window()
            while self.step < config.steps:
                self.step += 1
                self.window.append((self.step, *self._train_step()))
                stopping, last = self.trainer.any(stop.caught), self.step == config.steps
                validating = last or self.step % config.validate_every == 0
                saving = last or stopping or self.step % config.checkpoint_every == 0
                if validating or saving or self.step % config.log_every == 0:
                    self._close_window()
                if validating:
                    validation = self._validate()
                if saving:
                    self._save()
                if validating or saving:
                    self._open_window()
                if stopping:
                    break
        if self.step < config.steps:
            return TrainResult(self.step, self.out, None, None)
        return TrainResult(self.step, self.out, self._export(), validation)

    def _packs(self, step: int) -> list[Pack]:
        """The packs of a step, the next ones in the order of the data."""
        count = self.config.batch_tokens // self.config.pack_len
        return [self.data.pack((step - 1) * count + i) for i in range(count)]

    def _multiplier(self, step: int) -> float:
        return linear_multiplier(step, steps=self.config.steps, ramp=self.config.linear_ramp)

    def _learning_rate(self, step: int) -> float:
        return self.config.learning_rate * learning_rate_factor(
            step,
            steps=self.config.steps,
            warmup_steps=self.config.warmup_steps,
            decay_share=self.config.decay_share,
        )

    def _train_step(self) -> tuple[Tensor, Tensor]:
        return self.trainer.step(
            self._packs(self.step),
            learning_rate=self._learning_rate(self.step),
            multiplier=self._multiplier(self.step),
        )

    def _open_window(self) -> None:
        """Begin to collect steps whose losses have not been read, and to time them."""
        self.window: list[tuple[int, Tensor, Tensor]] = []
        self.window_start = time.perf_counter()

    def _close_window(self) -> None:
        """Read the losses, which waits for the device; log them, and stop at one that is no number."""
        values = torch.stack([torch.stack(step[1:]) for step in self.window]).tolist()
        seconds = (time.perf_counter() - self.window_start) / len(self.window)
        records: list[Record] = []
        for (step, *_), (loss, norm) in zip(self.window, values, strict=True):
            if not math.isfinite(loss + norm):
                self.log.write(records)
                self._fail(step)
            records.append(
                {
                    "event": "step",
                    "step": step,
                    "loss": loss,
                    "grad_norm": norm,
                    "learning_rate": self._learning_rate(step),
                    "linear_multiplier": self._multiplier(step),
                    "tokens": step * self.config.batch_tokens,
                    "tokens_per_s": self.config.batch_tokens / seconds,
                }
            )
        self.log.write(records)
        last = records[-1]
        self.progress.update(self.step, loss=last["loss"], tokens_per_s=last["tokens_per_s"])
        self._open_window()

    def _fail(self, step: int) -> None:
        """Raise for a step that was not finite and that changed nothing: the layer can be found."""
        what = self.trainer.find_non_finite(self._packs(step), multiplier=self._multiplier(step))
        saved = f"the last checkpoint is of step {self.saved_step}"
        saved = saved if self.saved_step > 0 else "there is no checkpoint yet"
        raise NonFiniteError(f"step {step}: {what} is not finite; {saved}")

    def _validate(self) -> Validation:
        """Losses on the validation documents, always on the same packs."""
        count = max(1, self.config.validation_tokens // self.validation_data.pack_len)
        count = min(count, self.validation_data.packs_per_pass)
        sums = self.trainer.evaluate([self.validation_data.pack(i) for i in range(count)])
        bits = self.held_out.bits_per_byte_of_a_nat
        result = Validation.of(sums, bits_per_byte_of_a_nat=bits)
        self.log.write([{"event": "validation", "step": self.step, **result.record()}])
        self.progress.say(
            f"step {self.step}: validation loss {result.nats:.4f}, "
            f"{result.bits_per_byte:.3f} bits per byte"
        )
        return result

    def _save(self) -> None:
        keep = self.config.keep_checkpoints
        self.trainer.save(self.out / "checkpoints", self.step, keep=keep)
        self.saved_step = self.step

    def _restore(self) -> None:
        """Take up the last checkpoint, if there is one."""
        step = self.trainer.load(self.out / "checkpoints")
        if step:
            self.step = self.saved_step = step

    def _export(self) -> Path:
        """The folder of the trained model, in the dtype it was trained in, with its tokenizer."""
        folder = self.out / "model"
        self.trainer.export(folder)
        if self.trainer.leads:
            self.tokenizer.save(folder)
        return folder


def _settings_of(config: TrainConfig) -> str:
    """What has to be the same on all ranks; paths may differ between machines."""
    return json.dumps(asdict(replace(config, corpus=(), tokenizer="", out="")))
