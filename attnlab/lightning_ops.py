"""Lightning attention's custom ops with gradients, made of a package of kernels.

Legend: B batch, H heads, T tokens, K key dim, V value dim, N documents.

`LightningOps` is what backends "triton" and "cuda" share: the layouts that kernels take, plans, fakes
for compilers, and which gradient goes where. `attnlab.lightning_scans` says which scans of a package
of kernels a call is made of.
"""

from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnlab import lightning_scans
from attnlab.checks import values_of
from attnlab.custom_op import CustomOp
from attnlab.schedules import MAX_REMEMBERED, Call, schedule_of


def _decay_of(log_decay: Tensor, like: Tensor) -> Tensor:
    if log_decay.device == like.device:
        return log_decay.float().contiguous()
    return _uploaded(values_of(log_decay), like.device)


@lru_cache(MAX_REMEMBERED)
def _uploaded(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def _contiguous_last(x: Tensor) -> Tensor:
    """The tensor itself, or a copy where its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_state(key: Tensor, value: Tensor, cu_seqlens: Tensor | None, needed: bool) -> Tensor:
    rows = key.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (rows, key.shape[1], key.shape[3], value.shape[3]) if needed else (0,)
    return key.new_empty(shape, dtype=torch.float32)


class LightningOps:
    """The ops of a backend, called as those of `attnlab.functional` after their checks."""

    def __init__(self, name: str, kernels: ModuleType, decode: Callable) -> None:
        """Register the ops `attnlab::lightning_NAME` and so on; `decode` makes a decoding step."""
        self._kernels, self._decode = kernels, decode
        self._gradients = CustomOp(
            f"lightning_{name}_backward", self._differentiate, self._fake_differentiate
        )
        self._attention = CustomOp(
            f"lightning_{name}",
            self._attend,
            self._fake_attend,
            setup_context=_save_for_backward,
            backward=self._autograd_backward,
        )
        self._state = CustomOp(
            f"lightning_state_{name}",
            self._sum_up,
            self._fake_sum_up,
            setup_context=_save_for_state_backward,
            backward=self._autograd_state_backward,
        )
        self._decode_ = CustomOp(
            f"lightning_decode_{name}_", self._step, self._fake_step, mutates=("state", 4)
        )

    def lightning_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_decay: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        scale: float = 1.0,
        initial_state: Tensor | None = None,
        return_final_state: bool = False,
        precision: str = "default",
    ) -> tuple[Tensor, Tensor | None]:
        """Output `[B, H, T, V]` and final states (float32, `[B or documents, H, K, V]`) or None."""
        may_read = not torch.compiler.is_compiling()
        output, state = self._attention(
            query, key, value, log_decay, initial_state, cu_seqlens,
            float(scale), return_final_state, precision, may_read,
        )  # fmt: skip
        return output, state if return_final_state else None

    def lightning_state(
        self, key: Tensor, value: Tensor, log_decay: Tensor, *, initial_state: Tensor | None = None
    ) -> Tensor:
        """State `[B, H, K, V]` float32 after all tokens."""
        may_read = not torch.compiler.is_compiling()
        return self._state(key, value, log_decay, initial_state, may_read)

    def lightning_decode_(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_decay: Tensor,
        state: Tensor,
        *,
        slots: Tensor | None = None,
        scale: float = 1.0,
        precision: str = "default",
    ) -> Tensor:
        """Output `[B, H, 1, V]` of one token; `state` (any strides, values contiguous) is updated.

        Every precision is met, since all arithmetic is float32.

        Raises:
            ValueError: for a state whose last dimension is not contiguous.
        """
        if state.stride(3) != 1:
            raise ValueError(
                f"expected a state with a contiguous last dim, got stride {state.stride(3)}"
            )
        return self._decode_(query, key, value, log_decay, state, slots, float(scale))

    def _tile_of(self, key: Tensor, value: Tensor, precision: str, **flags: bool) -> Any:
        kind = key.shape[3], value.shape[3], key.dtype, key.device, precision
        return self._kernels.tile_of(*kind, num_tokens=key.shape[:3].numel(), **flags)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_decay: Tensor,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        scale: float,
        return_final_state: bool,
        precision: str,
        may_read: bool,
    ) -> tuple[Tensor, Tensor]:
        """Output, and final states (empty unless asked for)."""
        output = lightning_scans.empty_output(query, value)
        query, key, value = map(self._kernels.aligned, (query, key, value))
        tile = self._tile_of(key, value, precision)
        schedule = schedule_of(Call(key, value, log_decay, cu_seqlens, tile, may_read))
        state = _empty_state(key, value, cu_seqlens, return_final_state)
        lightning_scans.forward(
            self._kernels, query, key, value, _decay_of(log_decay, key), schedule, tile, output,
            scale=scale,
            initial_state=None if initial_state is None else initial_state.float().contiguous(),
            final_state=state if return_final_state else None,
            precision=precision,
        )  # fmt: skip
        return output, state

    def _fake_attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_decay: Tensor,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        scale: float,
        return_final_state: bool,
        precision: str,
        may_read: bool,
    ) -> tuple[Tensor, Tensor]:
        output = lightning_scans.empty_output(query, value)
        return output, _empty_state(key, value, cu_seqlens, return_final_state)

    def _differentiate(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_decay: Tensor,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        grad_output: Tensor,
        grad_final_state: Tensor | None,
        scale: float,
        precision: str,
        may_read: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of query, key, value and initial state (empty without one)."""
        tensors = query, key, value, grad_output
        query, key, value, grad_output = map(self._kernels.aligned, tensors)
        num_scans = lightning_scans.scans_of_backward(key.shape[3], value.shape[3])
        tile = self._tile_of(key, value, precision, backward=True)
        schedule = schedule_of(Call(key, value, log_decay, cu_seqlens, tile, may_read, num_scans))
        grad_state = _empty_state(key, value, cu_seqlens, initial_state is not None)
        grads = lightning_scans.backward(
            self._kernels, query, key, value, _decay_of(log_decay, key), schedule, tile, grad_output,
            None if grad_final_state is None else grad_final_state.contiguous(),
            scale=scale,
            initial_state=None if initial_state is None else initial_state.float().contiguous(),
            grad_initial_state=None if initial_state is None else grad_state,
            precision=precision,
        )  # fmt: skip
        return *grads, grad_state

    def _fake_differentiate(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_decay: Tensor,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        grad_output: Tensor,
        grad_final_state: Tensor | None,
        scale: float,
        precision: str,
        may_read: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        contiguous = torch.contiguous_format
        dq, dk, dv = (torch.empty_like(x, memory_format=contiguous) for x in (query, key, value))
        return dq, dk, dv, _empty_state(key, value, cu_seqlens, initial_state is not None)

    def _autograd_backward(
        self, ctx: Any, grad_output: Tensor | None, grad_final_state: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        query, key, value, log_decay, initial_state, cu_seqlens = ctx.saved_tensors
        if grad_output is None:
            grad_output = query.new_zeros(*query.shape[:3], value.shape[3])
        if grad_final_state is not None and grad_final_state.numel() == 0:
            grad_final_state = None
        dq, dk, dv, grad_state = self._gradients(
            query, key, value, log_decay, initial_state, cu_seqlens, grad_output, grad_final_state,
            ctx.scale, ctx.precision, ctx.may_read,
        )  # fmt: skip
        no_more = (None,) * 5
        return dq, dk, dv, None, grad_state if initial_state is not None else None, *no_more

    def _sum_up(
        self,
        key: Tensor,
        value: Tensor,
        log_decay: Tensor,
        initial_state: Tensor | None,
        may_read: bool,
    ) -> Tensor:
        key, value = map(self._kernels.aligned, (key, value))
        tile = self._tile_of(key, value, "default")
        call = Call(key, value, log_decay, None, tile, may_read, states_only=True)
        schedule = schedule_of(call)
        initial = None if initial_state is None else initial_state.float().contiguous()
        return lightning_scans.final_states(
            self._kernels, key, value, _decay_of(log_decay, key), schedule, tile,
            initial_state=initial,
        )  # fmt: skip

    def _fake_sum_up(
        self,
        key: Tensor,
        value: Tensor,
        log_decay: Tensor,
        initial_state: Tensor | None,
        may_read: bool,
    ) -> Tensor:
        return _empty_state(key, value, None, True)

    def _autograd_state_backward(self, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of attention whose output has none: queries don't matter then."""
        key, value, log_decay, initial_state = ctx.saved_tensors
        nothing = torch.zeros_like(value)
        _, dk, dv, grad_state = self._gradients(
            key, key, value, log_decay, initial_state, None, nothing, grad,
            1.0, "default", ctx.may_read,
        )  # fmt: skip
        return dk, dv, None, grad_state if initial_state is not None else None, None

    def _step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_decay: Tensor,
        state: Tensor,
        slots: Tensor | None,
        scale: float,
    ) -> Tensor:
        query, key, value = (_contiguous_last(x) for x in (query, key, value))
        decay = _decay_of(log_decay, query)
        return self._decode(query, key, value, decay, state, slots=slots, scale=scale)

    def _fake_step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_decay: Tensor,
        state: Tensor,
        slots: Tensor | None,
        scale: float,
    ) -> Tensor:
        return query.new_empty(*query.shape[:3], value.shape[3])


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.scale, _, ctx.precision, ctx.may_read = inputs[6:]
    ctx.set_materialize_grads(False)


def _save_for_state_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.may_read = inputs[4]
