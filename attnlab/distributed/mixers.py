"""The model's mixers on many ranks: tokens over cp, heads over tp.

Legend: L tokens of a cp rank, l of this rank of its tp group, D hidden size, H query heads, G key
heads, K head dim; h, g of this rank's heads.

Outside the mixers every rank has tokens of its own. A mixer gathers those of its tp group, works on
its own heads for all of them, and scatters what it adds to the stream: sums over heads, of which each
rank keeps its tokens. Weights are whole on every rank while they are used, and sharded by FSDP over
all ranks otherwise; a rank uses the rows of its heads, and its gradients are zero elsewhere.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cache import KVCache, LayerCache, StateCache
from attnlab.distributed.comm import Group, sum_over_ranks
from attnlab.distributed.halo import short_convolution
from attnlab.distributed.lasp import lasp_attention
from attnlab.distributed.mesh import Meshes
from attnlab.distributed.overlap import begin
from attnlab.distributed.pack import PackPlan, Span
from attnlab.distributed.ring import ring_attention
from attnlab.model.attention import Angles, LightningMixer, SoftmaxMixer
from attnlab.model.convolution import ShortConvolution
from attnlab.model.heads import silu_heads
from attnlab.model.placement import Placement


@dataclass
class Context:
    """What the layers of a rank share: its meshes, the pack that is being worked on, and choices.

    num_groups: of tokens, on their way through the experts; method: of LASP, see `lasp_attention`.
    """

    meshes: Meshes
    num_groups: int = 2
    method: str = "gather"
    _plan: list[PackPlan] = field(default_factory=list)

    @property
    def plan(self) -> PackPlan:
        """The pack that is being worked on."""
        return self._plan[-1]

    def work_on(self, plan: PackPlan) -> None:
        """Take the pack of the next forward pass."""
        self._plan[:] = [plan]

    def group(self, axis: str) -> Group:
        """This rank's group along an axis of the meshes."""
        return self.meshes.group(axis)

    def token_counts(self) -> list[int]:
        """Tokens of each rank of this tp group."""
        return self._token_counts(self.group("cp").rank)

    def _token_counts(self, cp_rank: int) -> list[int]:
        tokens, tp = self.plan.local_len(cp_rank), self.group("tp").size
        return [tokens // tp + (rank < tokens % tp) for rank in range(tp)]

    def runs(self) -> list[list[Span]]:
        """Spans of the pack that each rank of the pack's group has, in the order of its tokens."""
        found = []
        for cp_rank in range(self.group("cp").size):
            stop = 0
            for count in self._token_counts(cp_rank):
                start, stop = stop, stop + count
                found.append(self.plan.places(cp_rank, Span(start, stop)))
        return found

    def own_tokens(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of a tensor of its cp rank's tokens."""
        return x.split(self.token_counts(), dim)[self.group("tp").rank]


class ContextLightning(LightningMixer):
    """The lightning mixer, whose states cross the ranks of cp."""

    context: Context

    def forward(
        self, hidden: Tensor, place: Placement, angles: Angles | None, cache: StateCache | None
    ) -> Tensor:
        """Mix `[1, l, D]` along the tokens of each document."""
        tp = self.context.group("tp")
        if tp.size == 1:
            return super().forward(hidden, place, angles, cache)
        whole = _gather_tokens(hidden, self.context)  # [1, L, D]
        if self.conv is not None:
            whole = self.conv(whole, place, cache)
        own = _own(self.num_heads * self.head_dim, tp)
        qkv = F.linear(whole, self.qkv_proj.weight[_own(self.qkv_proj.out_features, tp)])
        query, key, value = silu_heads(qkv, self.head_dim)  # [1, h, L, K]
        mixed = self._attend(query, key, value, place, cache).transpose(1, 2).flatten(2)
        normed = _norm_over_ranks(mixed, self.norm, own, tp)  # [1, L, h K]
        gated = torch.sigmoid(F.linear(whole, self.output_gate.weight[own])) * normed
        return _scatter_tokens(F.linear(gated, self.out_proj.weight[:, own]), self.context)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, place: Placement, cache: LayerCache | None
    ) -> Tensor:
        context = self.context
        return lasp_attention(
            query,
            key,
            value,
            self.log_decay,
            context.plan,
            context.group("cp"),
            method=context.method,
            backend=self.backend,
        )

    def _set_decay(self, device: torch.device) -> None:
        """Keep the decays of this rank's heads."""
        super()._set_decay(device)
        self.log_decay = self.log_decay[_own(self.num_heads, self.context.group("tp"))].clone()


class ContextSoftmax(SoftmaxMixer):
    """The softmax mixer, whose keys and values go around the ring of cp."""

    context: Context

    def forward(
        self, hidden: Tensor, place: Placement, angles: Angles | None, cache: KVCache | None
    ) -> Tensor:
        """Mix `[1, l, D]` along the tokens of each document."""
        tp = self.context.group("tp")
        if tp.size == 1:
            return super().forward(hidden, place, angles, cache)
        whole = _gather_tokens(hidden, self.context)  # [1, L, D]
        if self.conv is not None:
            whole = self.conv(whole, place, cache)
        query, key, value = (
            F.linear(whole, layer.weight[_own(layer.out_features, tp)])
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        query = self._heads(query, self.q_norm, angles)  # [1, h, L, K]
        key = self._heads(key, self.k_norm, angles)  # [1, g, L, K]
        value = self._heads(value, None, None)
        if self.length_scale is not None:
            scale = self.length_scale[_own(self.num_heads, tp)]
            seen = (place.positions + 1).to(query.dtype).log()  # [1, L]
            query = query * (seen[:, None, :, None] * scale[:, None, None])
        mixed = self._attend(query, key, value, place, cache).transpose(1, 2).flatten(2)
        own = _own(self.o_proj.in_features, tp)
        return _scatter_tokens(F.linear(mixed, self.o_proj.weight[:, own]), self.context)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, place: Placement, cache: LayerCache | None
    ) -> Tensor:
        return ring_attention(query, key, value, self.context.plan, self.context.group("cp"))


class ContextConvolution(ShortConvolution):
    """The short convolution, which reaches into the chunk before."""

    context: Context

    def forward(self, x: Tensor, place: Placement, cache: LayerCache | None) -> Tensor:
        """Convolve `[1, L, D]`."""
        return short_convolution(x[0], self.weight, self.context.plan, self.context.group("cp"))[
            None
        ]


REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    LightningMixer: ContextLightning,
    SoftmaxMixer: ContextSoftmax,
    ShortConvolution: ContextConvolution,
}
"""What takes the place of the model's modules."""


def replace_module(module: nn.Module, context: Context) -> None:
    """Make a module of the model the one that takes its place; its parameters stay what they are."""
    kind = REPLACEMENTS.get(type(module))
    if kind is not None:
        module.__class__ = kind
        module.context = context  # type: ignore[assignment]
    if isinstance(module, ContextLightning):
        module._set_decay(module.log_decay.device)


def _own(size: int, tp: Group) -> slice:
    """This rank's part of rows or columns that come head by head."""
    return slice(tp.rank * size // tp.size, (tp.rank + 1) * size // tp.size)


def _gather_tokens(x: Tensor, context: Context) -> Tensor:
    """`[1, L, D]` from each tp rank's `[1, l, D]`; gradients are summed over the ranks' uses."""
    tp, counts = context.group("tp"), context.token_counts()
    padded = F.pad(x[0], (0, 0, 0, max(counts) - x.shape[1]))
    parts = begin(padded, tp.all_gather, tp.reduce_scatter).end()  # [tp, max l, D]
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])[None]


def _scatter_tokens(x: Tensor, context: Context) -> Tensor:
    """This rank's `[1, l, D]` of the sum over tp of `[1, L, D]`."""
    tp, counts = context.group("tp"), context.token_counts()
    parts = [F.pad(p, (0, 0, 0, max(counts) - p.shape[0])) for p in x[0].split(counts)]
    own = begin(torch.stack(parts), tp.reduce_scatter, tp.all_gather).end()
    return own[None, : counts[tp.rank]]


def _norm_over_ranks(x: Tensor, norm: nn.RMSNorm, own: slice, tp: Group) -> Tensor:
    """RMSNorm over the channels of all ranks, of which `x` `[1, L, h K]` are this rank's."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    squares = sum_over_ranks(wide.square().sum(-1, keepdim=True), tp)
    assert norm.eps is not None
    normed = wide * torch.rsqrt(squares / norm.weight.shape[0] + norm.eps)
    return normed.to(x.dtype) * norm.weight[own]
