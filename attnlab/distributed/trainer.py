"""One optimiser step of a model on many ranks, called like `attnlab.training.trainer.Trainer`.

Legend: T tokens of a pack.

All ranks are given all packs of a step and take their part: replicas every dp-th pack, cp ranks their
chunk, tp ranks their tokens of it. Masters and moments are float32 and sharded.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from attnlab.checks import expect, remembered, values_of
from attnlab.distributed.checkpoint import export_model, load_sharded, save_sharded
from attnlab.distributed.comm import check_agreement
from attnlab.distributed.mesh import Meshes
from attnlab.distributed.mixers import Context
from attnlab.distributed.pack import PackPlan
from attnlab.distributed.parallel import ParallelLM, gradient_norm, shard_parameters
from attnlab.model.hybrid import HybridLM

BETAS = (0.9, 0.95)  # of MiniMax-01, arXiv 2501.08313, section 4.2


class PackedTokens(Protocol):
    """A pack, which its readers don't change."""

    @property
    def input_ids(self) -> Tensor:
        """`[1, T]`."""

    @property
    def targets(self) -> Tensor:
        """`[T]`, -100 where none counts."""

    @property
    def cu_seqlens(self) -> Tensor:
        """Bounds of the documents."""

    @property
    def num_targets(self) -> int:
        """How many targets count."""


class ParallelTrainer:
    """A model on all ranks of a job, in training mode, with its sharded masters and moments."""

    def __init__(
        self,
        lm: HybridLM,
        meshes: Meshes,
        *,
        dtype: torch.dtype = torch.float32,
        weight_decay: float = 0.1,
        clip_norm: float = 1.0,
        num_groups: int = 2,
        zigzag: bool = False,
    ) -> None:
        """Take a model that is the same on all ranks; layers compute in `dtype` from now on.

        num_groups: of tokens on their way through the experts; zigzag: two chunks a cp rank, which
        evens out what one long document costs the softmax layers.
        """
        model = ParallelLM(lm.train(), Context(meshes, num_groups))
        own = next(lm.parameters()).dtype
        self.model = shard_parameters(model, None if dtype == own else dtype)
        self.meshes, self.dtype = meshes, dtype
        self.clip_norm, self.zigzag = clip_norm, zigzag
        self.device = next(self.model.parameters()).device
        self.optimizer = torch.optim.AdamW(_groups(self.model, weight_decay), betas=BETAS)

    def step(
        self, packs: Sequence[PackedTokens], *, learning_rate: float, multiplier: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Update the weights once; returns the mean token loss and the gradient's norm.

        Both are scalars and the same on all ranks. If the norm is not finite, the weights are as they
        were.

        Raises:
            ValueError: on all ranks, if the packs' bounds differ between them, a pack is shorter than
                the cp ranks, or the packs can't be shared out evenly.
        """
        total = self.backward(packs, multiplier=multiplier)
        norm = self._update(learning_rate)
        num_targets = sum(pack.num_targets for pack in packs)
        return self.meshes.group("world").all_reduce(total).wait() / num_targets, norm

    def backward(self, packs: Sequence[PackedTokens], *, multiplier: float) -> Tensor:
        """Add this rank's part of a step's gradients; returns its sum of token losses.

        Raises:
            ValueError: as `step`.
        """
        dp, cp, world = (self.meshes.group(axis) for axis in ("dp", "cp", "world"))
        told = self.zigzag, [_bounds(pack) for pack in packs]
        check_agreement(world, told, "cu_seqlens and zigzag")
        expect(len(packs) % dp.size == 0, f"packs in a multiple of dp {dp.size}", len(packs))
        plans = [self._plan(pack) for pack in packs]
        num_targets = sum(pack.num_targets for pack in packs)
        self.model.lm.linear_multiplier = multiplier
        total = torch.zeros((), device=self.device)
        for pack, plan in list(zip(packs, plans, strict=True))[dp.rank :: dp.size]:
            ids = plan.shard(pack.input_ids, cp.rank, 1).to(self.device)
            targets = plan.shard(pack.targets, cp.rank).to(self.device)
            share = pack.num_targets / num_targets
            total = total + self.model.backward(
                ids, targets, plan, num_targets=num_targets, share=share
            )
        return total

    @torch.no_grad()
    def losses(self, pack: PackedTokens) -> tuple[Tensor, Tensor, Tensor]:
        """Losses of this rank's tokens of a pack, their targets, and their places in their documents.

        All are `[l]`; a loss is 0 where a target doesn't count. The model is left in the mode in
        which it was. Replicas may have packs of their own.

        Raises:
            ValueError: on all ranks, if the bounds differ between ranks of a replica, or a pack is
                shorter than the cp ranks.
        """
        cp, world = self.meshes.group("cp"), self.meshes.group("world")
        told = self.zigzag, _bounds(pack)
        check_agreement(world, told, "cu_seqlens and zigzag", parts=self.meshes.layout.dp)
        plan = self._plan(pack)
        logits, _ = self.model(plan.shard(pack.input_ids, cp.rank, 1).to(self.device), plan)
        # FSDP keeps the outermost weights whole for a backward, which doesn't come here.
        assert isinstance(self.model, FSDPModule)
        self.model.reshard()
        targets = plan.shard(pack.targets, cp.rank)
        places = plan.document_positions(cp.rank)
        targets, places = (
            self.model.context.own_tokens(x, 0).to(self.device) for x in (targets, places)
        )
        wide = torch.promote_types(logits.dtype, torch.float32)
        losses = F.cross_entropy(logits[0].to(wide), targets, ignore_index=-100, reduction="none")
        return losses, targets, places

    def save(self, folder: Path, step: int, *, keep: int = 2) -> None:
        """Write a sharded checkpoint; see `save_sharded`."""
        save_sharded(self.model, self.optimizer, folder, step, keep=keep)

    def load(self, folder: Path) -> int:
        """Take the last sharded checkpoint back; returns its step, 0 for none."""
        return load_sharded(self.model, self.optimizer, folder)

    def export(self, folder: Path) -> None:
        """Write the model as one process reads it, in the dtype in which its layers compute."""
        export_model(self.model, folder, dtype=self.dtype)

    def _plan(self, pack: PackedTokens) -> PackPlan:
        """The plan of a pack whose bounds all ranks of a replica have agreed on."""
        make = PackPlan.zigzag if self.zigzag else PackPlan.contiguous
        plan = make(_bounds(pack), self.meshes.layout.cp)
        self.meshes.group("cp").agree_on(plan)
        return plan

    def _update(self, learning_rate: float) -> Tensor:
        norm = gradient_norm(self.model)
        if norm.isfinite():
            scale = (self.clip_norm / norm).clamp(max=1.0).item()
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(scale)
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm


def _bounds(pack: PackedTokens) -> tuple[int, ...]:
    return remembered(pack.cu_seqlens, values_of)


def _groups(model: ParallelLM, weight_decay: float) -> list[dict]:
    """Groups of parameters: experts lie on another mesh than the rest; vectors do not decay."""
    found = []
    for on_ep in (False, True):
        named = [p for n, p in model.named_parameters() if (".experts." in n) == on_ep]
        for decays in (True, False):
            parameters = [p for p in named if (p.ndim >= 2) == decays]
            decay = weight_decay if decays else 0.0
            found += [{"params": parameters, "weight_decay": decay}] if parameters else []
    return found
