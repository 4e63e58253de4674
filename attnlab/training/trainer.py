"""One optimiser step of a model over a list of packs, its losses, and its state on disk.

Nothing here knows of schedules or the corpus. `attnlab.training.ranks` has the same for many ranks.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnlab.model.hybrid import HybridLM
from attnlab.training.checkpoints import load_checkpoint, save_checkpoint
from attnlab.training.guard import first_non_finite
from attnlab.training.objective import backward, sum_losses
from attnlab.training.optimizer import MasterAdamW
from attnlab.training.packing import Pack


class Trainer:
    """A model in training mode with its masters and moments."""

    leads = True

    def any(self, flag: bool) -> bool:
        """Whether any process of the run says so: there is one."""
        return flag

    def __init__(
        self, model: HybridLM, *, dtype: torch.dtype, weight_decay: float, clip_norm: float
    ) -> None:
        """Take a float32 model, which computes in `dtype` from now on."""
        self.model, self.clip_norm = model.train(), clip_norm
        self.device = next(model.parameters()).device
        self.optimizer = MasterAdamW(model, dtype=dtype, weight_decay=weight_decay)

    def step(
        self, packs: Sequence[Pack], *, learning_rate: float, multiplier: float
    ) -> tuple[Tensor, Tensor]:
        """Update the weights once; returns the mean token loss and the gradient's norm.

        Both are float32 scalars on the device, which has not been waited for. If either is not
        finite the weights are as they were.
        """
        num_targets = sum(pack.num_targets for pack in packs)
        self.model.linear_multiplier = multiplier
        losses = []
        for pack in packs:
            losses.append(backward(self.model, pack.to(self.device), num_targets=num_targets))
            self.optimizer.collect_gradients()
        norm = self.optimizer.step(learning_rate=learning_rate, clip_norm=self.clip_norm)
        return torch.stack(losses).sum() / num_targets, norm

    def find_non_finite(self, packs: Sequence[Pack], *, multiplier: float) -> str:
        """Which part of the model is the first not to be finite on these packs."""
        self.model.linear_multiplier = multiplier

        def run() -> None:
            for pack in packs:
                backward(self.model, pack.to(self.device), num_targets=pack.num_targets)

        first = first_non_finite(self.model, run)
        return first.what if first else "the norm of the gradient"

    def evaluate(self, packs: Sequence[Pack]) -> Tensor:
        """`octave_sums` of all packs."""
        return sum_losses(self.model, packs)

    def save(self, folder: Path, step: int, *, keep: int) -> None:
        """Write a checkpoint; see `save_checkpoint`."""
        save_checkpoint(folder, step, {"step": step, **self.state_dict()}, keep=keep)

    def load(self, folder: Path) -> int:
        """Take the last checkpoint back; returns its step, 0 for none.

        Raises:
            ValueError: for a damaged checkpoint, or one of a job of ranks.
        """
        state = load_checkpoint(folder)
        if state is None:
            return 0
        self.load_state_dict(state)
        return state["step"]

    def export(self, folder: Path) -> None:
        """Write the model in the dtype it was trained in."""
        self.model.save_pretrained(folder, layout="transformers")

    def state_dict(self) -> dict[str, Any]:
        """Masters, moments and random generators."""
        state = {"optimizer": self.optimizer.state_dict(), "rng": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take all of it back."""
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
