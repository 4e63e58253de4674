"""Custom ops whose functions eager calls reach without the dispatcher.

A custom op is what torch.compile, transforms and modes see of a kernel. To get to its function
through the dispatcher takes about 0.1 ms, longer than a short kernel runs. So an eager call on plain
tensors, with nothing around it that wants to see ops, calls the function itself, inside an autograd
function if a gradient is wanted.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_PLAIN = (Tensor, torch.nn.Parameter)


class CustomOp:
    """The op `attnlab::name` made of a function, and the shorter way to that function.

    `fake`, `setup_context` and `backward` are as `torch.library` takes them; arguments are
    positional. `mutates` names the parameter that is changed in place, the `position`-th.
    """

    def __init__(
        self,
        name: str,
        function: Callable,
        fake: Callable,
        *,
        setup_context: Callable | None = None,
        backward: Callable | None = None,
        mutates: tuple[str, int] | None = None,
    ) -> None:
        """Register the op."""
        mutated = () if mutates is None else (mutates[0],)
        made = torch.library.custom_op(f"attnlab::{name}", function, mutates_args=mutated)
        made.register_fake(fake)
        self._function, self._autograd_function = function, None
        self._mutated = None if mutates is None else mutates[1]
        if setup_context is not None and backward is not None:
            made.register_autograd(backward, setup_context=setup_context)
            self._autograd_function = _autograd_function(function, setup_context, backward)
        self._op = getattr(torch.ops.attnlab, name).default

    def __call__(self, *arguments: Any) -> Any:
        """Results of the op."""
        if torch.compiler.is_compiling() or not _is_plain(arguments):
            return self._op(*arguments)
        if torch.is_grad_enabled() and _requires_grad(arguments):
            # Without a gradient of its own the op gives results that refuse to be differentiated.
            return (self._autograd_function or self._op)(*arguments)
        if self._mutated is not None and not arguments[self._mutated].is_inference():
            torch.autograd.graph.increment_version(arguments[self._mutated])
        return self._function(*arguments)


def _autograd_function(function: Callable, setup_context: Callable, backward: Callable) -> Callable:
    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            results = function(*arguments)
            setup_context(ctx, arguments, results)
            return results

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            return backward(ctx, *grads)

    return Eager.apply


def _is_plain(arguments: Sequence[Any]) -> bool:
    """Whether nothing wants to see the op: no mode, no transform, no subclass of tensors."""
    if is_in_torch_dispatch_mode() or torch._C._are_functorch_transforms_active():
        return False
    return not any(isinstance(x, Tensor) and type(x) not in _PLAIN for x in arguments)


def _requires_grad(arguments: Sequence[Any]) -> bool:
    return any(isinstance(x, Tensor) and x.requires_grad for x in arguments)
