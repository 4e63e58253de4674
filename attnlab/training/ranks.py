"""The trainer of a run on many ranks: the methods of `attnlab.training.trainer.Trainer`."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from attnlab.checks import expect
from attnlab.distributed.trainer import ParallelTrainer
from attnlab.training.checkpoints import list_checkpoints
from attnlab.training.guard import first_non_finite
from attnlab.training.objective import empty_sums, octave_sums
from attnlab.training.packing import Pack


class RankTrainer(ParallelTrainer):
    """`ParallelTrainer` with what a run needs besides steps."""

    @property
    def leads(self) -> bool:
        """Whether this rank speaks and writes for all."""
        return self.meshes.group("world").rank == 0

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        flags = torch.tensor([float(flag)], device=self.device)
        return bool(self.meshes.group("world").all_reduce(flags).wait() > 0)

    def evaluate(self, packs: Sequence[Pack]) -> Tensor:
        """`octave_sums` of all packs, the same on all ranks; replicas share the packs out."""
        dp = self.meshes.group("dp")
        sums = empty_sums(self.device)
        self.model.eval()
        for turn in range(-(-len(packs) // dp.size)):
            index = turn * dp.size + dp.rank
            # Every rank has to make each turn, since all hold parts of the weights.
            found = octave_sums(*self.losses(packs[min(index, len(packs) - 1)]))
            sums += found if index < len(packs) else 0 * found
        self.model.train()
        return self.meshes.group("world").all_reduce(sums).wait()

    def find_non_finite(self, packs: Sequence[Pack], *, multiplier: float) -> str:
        """Which part of the model is the first not to be finite, on whichever rank that is."""
        own = first_non_finite(self.model.lm, lambda: self.backward(packs, multiplier=multiplier))
        found = [own] * self.meshes.layout.world_size
        dist.all_gather_object(found, own)
        first = min((one for one in found if one is not None), default=None)
        return first.what if first else "the norm of the gradient"

    def load(self, folder: Path) -> int:
        """Take the last sharded checkpoint back; returns its step, 0 for none.

        Raises:
            ValueError: on all ranks, for a checkpoint of one process, of another model, or damaged.
        """
        single = [path.name for path in list_checkpoints(folder)]
        words = f"checkpoints of a job in {folder}"
        expect(not single, words, f"{single[-1:]} of one process: go on without torchrun")
        return super().load(folder)
