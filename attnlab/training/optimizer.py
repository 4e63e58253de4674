"""AdamW on float32 master weights, of a model whose own weights may be bfloat16.

The model computes with bfloat16 copies; gradients are summed, clipped and applied in float32, and
the copies are rounded anew after each update, so no update is lost below a weight's rounding.
`torch.autocast` is something else: it keeps float32 weights, casts them at every use, chooses the
dtype op by op and knows nothing of attnlab's ops. Here a model runs in training exactly as it is
served later: in one dtype, with the lightning state in float32 inside the op.
"""

from typing import Any

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.95)  # of MiniMax-01, arXiv 2501.08313, section 4.2, as is the decay of 0.1
EPSILON = 1e-8


class MasterAdamW:
    """The masters of a model's parameters, their gradients and their AdamW."""

    def __init__(self, model: nn.Module, *, dtype: torch.dtype, weight_decay: float) -> None:
        """Keep the float32 parameters of `model` as masters, and make the model's `dtype`.

        Weights decay in matrices alone: norms and biases are vectors.
        """
        self.copies = dict(model.named_parameters())
        self.masters = dict(self.copies)
        if dtype != torch.float32:
            self.masters = {n: nn.Parameter(p.detach().clone()) for n, p in self.copies.items()}
            for copy in self.copies.values():
                copy.data = copy.data.to(dtype)
        matrices = [p for p in self.masters.values() if p.ndim >= 2]
        vectors = [p for p in self.masters.values() if p.ndim < 2]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        # Fused, because only then an update can be skipped without asking the GPU first.
        self.adamw = torch.optim.AdamW(groups, betas=BETAS, eps=EPSILON, fused=True)

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Add the gradients of the copies to those of the masters."""
        # All at once: on a GPU a launch a tensor takes longer than the tensors of a small model.
        sums, parts, fresh = [], [], []
        for name, copy in self.copies.items():
            master = self.masters[name]
            if copy is master or copy.grad is None:
                continue
            if master.grad is None:
                master.grad = torch.empty_like(master)
                fresh.append((master.grad, copy.grad))
            else:
                sums.append(master.grad)
                parts.append(copy.grad)
            copy.grad = None
        _copy(fresh)
        if sums:
            torch._foreach_add_(sums, parts)

    def step(self, *, learning_rate: float, clip_norm: float) -> Tensor:
        """Clip, update, and forget the gradients; returns their norm before, float32 scalar.

        Where the norm is not finite nothing is changed, so that the model can be looked into.
        """
        gradients = [p.grad for p in self.masters.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        torch._foreach_mul_(gradients, (clip_norm / norm).clamp(max=1.0))
        self.adamw.found_inf = norm.isfinite().logical_not().float()  # type: ignore[attr-defined]
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        self.adamw.zero_grad()
        self._round()
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Masters by parameter name, and AdamW's own state."""
        masters = {name: p.detach() for name, p in self.masters.items()}
        return {"masters": masters, "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take both back, and round the masters into the model."""
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(state["masters"][name])
        self.adamw.load_state_dict(state["adamw"])
        self._round()

    @torch.no_grad()
    def _round(self) -> None:
        pairs = [(copy, self.masters[name]) for name, copy in self.copies.items()]
        _copy([(copy, master) for copy, master in pairs if copy is not master])


def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy the second of each pair into the first."""
    if pairs:
        torch._foreach_copy_([to for to, _ in pairs], [source for _, source in pairs])
