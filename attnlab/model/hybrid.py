"""The hybrid language model of MiniMax-01: decoder, output matrix, caches, and what they cost.

Legend: B batch, T tokens, D hidden size, V vocabulary, N packed sequences.

Modules and parameters are named as in transformers' MiniMax class.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cache import KVCache, LayerCache, ModelCache, StateCache
from attnlab.checks import expect
from attnlab.model import costs, placement
from attnlab.model.attention import LightningMixer, SoftmaxMixer
from attnlab.model.config import LINEAR, HybridConfig
from attnlab.model.decoder import Decoder
from attnlab.model.moe import RouterLoad, balancing_loss
from attnlab.registry import list_backends


class HybridOutput(NamedTuple):
    """What a forward call gives.

    `logits` `[B, T or as many as were kept, V]`; `aux_loss` the router's load-balancing loss without
    its coefficient, in training alone; `hidden` `[B, T, D]` what the head is applied to, if asked
    for.
    """

    logits: Tensor
    aux_loss: Tensor | None
    hidden: Tensor | None


class HybridLM(nn.Module):
    """Language model: token ids to logits of the next token.

    `gradient_checkpointing` recomputes each layer in the backward instead of keeping what is inside
    it. `linear_multiplier` scales the outputs of the lightning mixers, in training alone.
    """

    def __init__(
        self,
        config: HybridConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Build the model with new weights; on the meta device it takes no memory."""
        super().__init__()
        self.config = config
        factory = {"device": device, "dtype": dtype}
        self.model = Decoder(config, **factory)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, **factory)
        self._tie()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw matrices from a normal distribution with the config's deviation; norms are ones.

        Convolutions are uniform in +-W^(-1/2), so that they pass their inputs on.
        """
        for name, weight in self.named_parameters():
            if name.endswith("length_scale"):
                weight.fill_(self.config.log_length_scale_init)
            elif name.endswith("conv.weight"):
                nn.init.uniform_(weight, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)
            elif weight.ndim == 1:
                weight.fill_(1.0)
            else:
                weight.normal_(0.0, self.config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        *,
        cache: ModelCache | None = None,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        logits_to_keep: int = 0,
        return_hidden: bool = False,
    ) -> HybridOutput:
        """Logits of each token's successor.

        Args:
            input_ids: `[B, T]` integers.
            cache: what earlier calls have seen, one row a sequence; it is updated in place. A call
                with a cache records no gradients.
            cu_seqlens: `[N+1]` bounds of sequences packed end to end in one row (B = 1). With a
                cache, sequence n continues its row n.
            attention_mask: `[B, T]`, 0 at padding, which must come first; logits there are 0.
            logits_to_keep: how many of each row's last tokens get logits, 0 for all. Of packed
                sequences, 1 keeps the last token of each: `[1, N, V]` (0 where it is empty).
            return_hidden: whether to return the final states of all tokens.

        Raises:
            ValueError: for shapes that don't fit, padding after a token, ids outside the
                vocabulary, or a cache without room; nothing has been written then.
        """
        placement.check_ids(input_ids, self.config.vocab_size)
        expect(attention_mask is None or cu_seqlens is None, "a mask or cu_seqlens", "both")
        _check_kept(logits_to_keep, packed=cu_seqlens is not None)
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            padding = placement.left_padding(attention_mask, input_ids)
            if padding is None:
                x, loads = self._decoded(input_ids, cu_seqlens, cache)
            else:
                x, loads = self._unpadded(input_ids, padding, cache)
            return self._head(x, loads, cu_seqlens, logits_to_keep, return_hidden)

    def _decoded(
        self, input_ids: Tensor, cu_seqlens: Tensor | None, cache: ModelCache | None
    ) -> tuple[Tensor, list[RouterLoad]]:
        """States `[B, T, D]` behind the last layer, and the routers' loads in training."""
        if cu_seqlens is None:
            place = placement.dense(input_ids, cache)
        else:
            place = placement.packed(input_ids, cu_seqlens, cache)
        x, loads = self.model(input_ids, place, cache)
        if cache is not None:
            assert place.counts is not None
            new = input_ids.shape[1] if place.cu_seqlens is None else place.cu_seqlens.diff()
            cache.advance(place.counts, new)
        return x, loads

    def _unpadded(
        self, input_ids: Tensor, mask: Tensor, cache: ModelCache | None
    ) -> tuple[Tensor, list[RouterLoad]]:
        """`_decoded` of a batch of which only the tokens under `mask` exist; 0 elsewhere."""
        bounds = F.pad(mask.sum(1).cumsum(0), (1, 0))
        mask = mask.to(input_ids.device)
        packed, loads = self._decoded(input_ids[mask][None], bounds, cache)
        x = packed.new_zeros(*mask.shape, packed.shape[2])
        return x.masked_scatter(mask[..., None], packed), loads

    def _head(
        self,
        x: Tensor,
        loads: list[RouterLoad],
        cu_seqlens: Tensor | None,
        logits_to_keep: int,
        return_hidden: bool,
    ) -> HybridOutput:
        """Norm and head; what gets no logits and wasn't asked for isn't normalised either."""
        hidden = self.model.norm(x) if return_hidden else None
        kept = _last(x if hidden is None else hidden, cu_seqlens, logits_to_keep)
        logits = self.lm_head(self.model.norm(kept) if hidden is None else kept)
        loss = balancing_loss(loads, self.config.router_aux_loss) if loads else None
        return HybridOutput(logits, loss, hidden)

    def new_cache(
        self,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> ModelCache:
        """Empty cache for `batch` sequences of up to `capacity` tokens.

        Keys and values are in `dtype` (default: the model's), states in float32.
        """
        expect(batch >= 1 and capacity >= 1, "batch and capacity >= 1", (batch, capacity))
        weight = self.lm_head.weight
        dtype, device = dtype or weight.dtype, torch.device(device or weight.device)
        config, dim = self.config, self.config.head_dim
        taps = max(config.conv_width - 1, 0)

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(batch, *shape, dtype=dtype, device=device)

        layers: list[LayerCache] = []
        for kind in config.layer_types:
            conv_inputs = zeros(taps, config.hidden_size) if taps else None
            if kind == LINEAR:
                wide = torch.promote_types(dtype, torch.float32)
                state = zeros(config.num_attention_heads, dim, dim, dtype=wide)
                layers.append(StateCache(state, conv_inputs))
            else:
                shape = config.num_key_value_heads, capacity, dim
                layers.append(KVCache(zeros(*shape), zeros(*shape), conv_inputs))
        return ModelCache(layers, zeros(dtype=torch.int64), capacity)

    def use_backend(self, lightning: str | None = None, softmax: str | None = None) -> "HybridLM":
        """Let the mixers of each kind use a backend by name; None leaves the choice to the ops.

        Raises:
            ValueError: if the op has no backend of that name.
        """
        for op, name in (("lightning_attention", lightning), ("softmax_attention", softmax)):
            known = list_backends(op)
            expect(name is None or name in known, f"a backend among {', '.join(known)}", name)
        for module in self.modules():
            if isinstance(module, LightningMixer):
                module.backend = lightning
            elif isinstance(module, SoftmaxMixer):
                module.backend = softmax
        return self

    def num_parameters(self) -> int:
        """Parameters of the whole model."""
        return sum(weight.numel() for weight in self.parameters())

    def num_active_parameters(self) -> int:
        """Parameters that a token meets, embedding and output matrix not counted."""
        return self.config.num_active_parameters()

    def cache_bytes(self, context: int, batch: int = 1) -> int:
        """Bytes of a cache that holds `context` tokens of each of `batch` sequences."""
        return costs.cache_bytes(self.config, context, batch, self.lm_head.weight.dtype)

    def prefill_flops(self, context: int) -> int:
        """Operations of a forward pass over `context` tokens that gives the last one's logits."""
        return costs.prefill_flops(self.config, context)

    def decode_flops(self, context: int) -> int:
        """Operations of one more token behind `context` others."""
        return costs.decode_flops(self.config, context)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "HybridLM":
        """Model from a folder with `config.json` and safetensors; see `attnlab.model.checkpoint`."""
        from attnlab.model import checkpoint as files

        model = cls(files.read_config(path), device="meta", dtype=dtype or files.stored_dtype(path))
        files.load(model, path, device=device)
        return model.to(device or "cpu").eval()

    def save_pretrained(self, path: str | Path, layout: str = "released") -> None:
        """Write `config.json` and safetensors in the layout "released" or "transformers"."""
        from attnlab.model import checkpoint as files

        files.save(self, path, layout=layout)

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether each layer is computed again in the backward."""
        return self.model.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.model.gradient_checkpointing = value

    @property
    def linear_multiplier(self) -> float:
        """Factor of the lightning mixers' outputs in training."""
        return self.model.linear_multiplier

    @linear_multiplier.setter
    def linear_multiplier(self, value: float) -> None:
        self.model.linear_multiplier = value

    def _tie(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Move the model; embedding and head stay one where they were."""
        super()._apply(fn, recurse)
        self._tie()
        return self


def _last(x: Tensor, cu_seqlens: Tensor | None, kept: int) -> Tensor:
    """The last `kept` tokens of each row of `[B, T, D]`, or the last of each packed sequence."""
    if kept == 0:
        return x
    if cu_seqlens is None:
        return x[:, -kept:]
    bounds = cu_seqlens.to(x.device)
    last = x[:, (bounds[1:] - 1).clamp(min=0)]
    return last * (bounds.diff() > 0)[:, None]


def _check_kept(kept: int, packed: bool) -> None:
    allowed = kept in (0, 1) if packed else kept >= 0
    expect(allowed, "logits_to_keep 0 or 1" if packed else "logits_to_keep >= 0", kept)
