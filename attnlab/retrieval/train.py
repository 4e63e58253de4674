"""Training of one small model on retrieval tasks, to be read from top to bottom.

A run lives in one folder:
    run.json        its settings, the model's config, and at the end how well it does
    log.jsonl       a line a window of steps and a line a validation
    checkpoints/    its last state while it is not finished
    model/          at the end: weights and config

A step is a function of its number and of the state before it, so a run that was interrupted goes on
as if it had not been.
"""

import json
import math
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnlab.checks import expect
from attnlab.model.hybrid import HybridLM
from attnlab.retrieval.batch import Batch, answer_loss
from attnlab.retrieval.mixture import Mixture, accuracies, validation_batches
from attnlab.retrieval.models import start_as_shifts
from attnlab.retrieval.runs import DTYPES, Run, Trained, read_trained
from attnlab.retrieval.streaming import tail_logits
from attnlab.retrieval.symbols import Vocabulary
from attnlab.training.checkpoints import load_checkpoint, save_checkpoint, write_atomically
from attnlab.training.guard import NonFiniteError, StopSignal
from attnlab.training.log import RunLog
from attnlab.training.optimizer import MasterAdamW
from attnlab.training.progress import Progress
from attnlab.training.schedule import learning_rate_factor, linear_multiplier

SAVE_EVERY = 200  # steps, so that a kill costs no more


def train(
    run: Run,
    out: Path,
    *,
    device: str,
    deadline: float = math.inf,
    corpus: Tensor | None = None,
    held_out: Tensor | None = None,
) -> Trained | None:
    """Train a model in the folder `out`, or go on with it; None if the time or a signal ended it.

    `deadline` is a `time.monotonic()` at which the state is saved; `corpus` and `held_out` `[L]` are
    the bytes for training and validation where the data are text.

    Raises:
        ValueError: for a folder that holds another run, or text without a corpus.
        NonFiniteError: with the step.
    """
    earlier = read_trained(out)
    path = out / "run.json"
    if path.exists() and Run.from_json(json.loads(path.read_text())["run"]) != run:
        raise ValueError(f"expected the run {run.name} or none in {out}, got one of other settings")
    if earlier is not None:
        return earlier
    expect(run.data != "text" or corpus is not None, "a corpus for text", "none")
    out.mkdir(parents=True, exist_ok=True)
    _write(path, {"run": run.to_json()})
    return _Training(run, out, device, corpus, held_out).execute(deadline)


class _Training:
    """A run in memory."""

    def __init__(
        self, run: Run, out: Path, device: str, corpus: Tensor | None, held_out: Tensor | None
    ) -> None:
        self.run, self.out, self.device = run, out, device
        self.ramp = run.build().linear_ramp
        torch.manual_seed(run.seed)
        self.model = HybridLM(run.build().config, device=device, dtype=torch.float32).train()
        start_as_shifts(self.model)
        self.optimizer = MasterAdamW(
            self.model, dtype=DTYPES[run.dtype], weight_decay=run.weight_decay
        )
        self.mixture = Mixture(
            data=run.data,
            batch_tokens=run.batch_tokens,
            curriculum=run.curriculum,
            seed=run.seed,
            tasks=run.tasks,
            vocabulary=self._vocabulary(),
            device=device,
            corpus=None if corpus is None else corpus.to(device),
        )
        self.held_out = None if held_out is None else held_out.to(device)
        self.step, self.saved_step, self.seconds = 0, -1, 0.0

    def execute(self, deadline: float) -> Trained | None:
        """All steps that are left; None if they weren't done in time."""
        self._restore()
        run = self.run
        with (
            closing(RunLog(self.out / "log.jsonl", step=self.saved_step)) as self.log,
            Progress(step=self.step, steps=run.steps) as self.progress,
            StopSignal() as stop,
        ):
            self._open_window()
            while self.step < run.steps:
                self.step += 1
                self.window.append(self._train_step())
                if self.step % _window(run.steps) == 0 or self.step == run.steps:
                    self._close_window()
                    if self.step % SAVE_EVERY == 0:
                        self._save()
                    if stop.caught or (time.monotonic() > deadline and self.step < run.steps):
                        self._save()
                        return None
            return self._finish()

    def _train_step(self) -> Tensor:
        """The loss, a scalar on the device, which has not been waited for."""
        run, batch = self.run, self.mixture.batch(self.step, self.run.steps)
        self.model.linear_multiplier = linear_multiplier(self.step, steps=run.steps, ramp=self.ramp)
        loss = answer_loss(tail_logits(self.model, batch.input_ids, batch.tail_len), batch)
        loss.backward()
        self.optimizer.collect_gradients()
        norm = self.optimizer.step(learning_rate=self._learning_rate(), clip_norm=run.clip_norm)
        return torch.stack([loss.detach(), norm])

    def _learning_rate(self) -> float:
        run = self.run
        return run.learning_rate * learning_rate_factor(
            self.step,
            steps=run.steps,
            warmup_steps=run.warmup_steps,
            decay_share=run.decay_share,
        )

    def _open_window(self) -> None:
        self.window: list[Tensor] = []
        self.window_start = time.perf_counter()

    def _close_window(self) -> None:
        """Read the losses of the steps since the last time, and log their means."""
        losses, norms = torch.stack(self.window).double().mean(0).tolist()
        if not math.isfinite(losses + norms):
            raise NonFiniteError(
                f"{self.run.name}: loss or gradient is not finite, step {self.step}"
            )
        seconds = time.perf_counter() - self.window_start
        self.seconds += seconds
        tokens_per_s = len(self.window) * self.run.batch_tokens / seconds
        record = {
            "event": "step",
            "step": self.step,
            "loss": losses,
            "grad_norm": norms,
            "learning_rate": self._learning_rate(),
            "linear_multiplier": self.model.linear_multiplier,
            "tokens_per_s": tokens_per_s,
            "seconds": round(self.seconds, 3),
        }
        if self.step % (4 * _window(self.run.steps)) == 0:
            shortest = self.run.validation_lengths[:1]
            record["accuracies"] = self._validate(shortest)
        self.log.write([record])
        self.progress.update(self.step, loss=losses, tokens_per_s=tokens_per_s)
        self._open_window()

    def _validate(self, lengths: tuple[int, ...]) -> dict[str, float]:
        corpus = self.held_out if self.held_out is not None else self.mixture.corpus
        mixture = replace(self.mixture, corpus=corpus)
        batches = validation_batches(mixture, rows=self.run.validation_rows, lengths=list(lengths))
        self.model.eval()
        shares = accuracies(self._logits, batches)
        self.model.train()
        return {name: round(share, 5) for name, share in shares.items()}

    def _logits(self, batch: Batch) -> Tensor:
        return tail_logits(self.model, batch.input_ids, batch.tail_len)

    def _vocabulary(self) -> Vocabulary:
        """That of the symbols; for other data only its size matters, which is the model's."""
        if self.run.data == "symbols":
            return self.run.vocabulary
        size = self.run.build().config.vocab_size
        return Vocabulary(num_keys=size - 10, num_values=1, num_noise=1)

    def _finish(self) -> Trained:
        """Judge and write the model, and clear the checkpoints away."""
        shares = self._validate(self.run.validation_lengths)
        self.log.write([{"event": "validation", "step": self.step, "accuracies": shares}])
        self.model.eval().save_pretrained(self.out / "model", layout="transformers")
        trained = Trained(
            run=self.run,
            accuracies=shares,
            seconds=round(self.seconds, 2),
            num_parameters=self.model.num_parameters(),
        )
        _write(self.out / "run.json", {**asdict(trained), "run": self.run.to_json()})
        shutil.rmtree(self.out / "checkpoints", ignore_errors=True)
        self.progress.say(f"{self.run.name}: {trained.score:.3f} in {self.seconds:.0f} s")
        return trained

    def _save(self) -> None:
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "optimizer": self.optimizer.state_dict(),
        }
        save_checkpoint(self.out / "checkpoints", self.step, state, keep=1)

    def _restore(self) -> None:
        state = load_checkpoint(self.out / "checkpoints")
        if state is not None:
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = self.saved_step = state["step"]
            self.seconds = state["seconds"]


def _window(steps: int) -> int:
    """Steps between two reads of the loss, each of which waits for the device."""
    return max(min(25, steps // 8), 1)


def _write(path: Path, record: dict[str, Any]) -> None:
    text = json.dumps(record, indent=1) + "\n"
    writer: Callable[[Path], Any] = lambda partial: partial.write_text(text)  # noqa: E731
    write_atomically(path, writer)
