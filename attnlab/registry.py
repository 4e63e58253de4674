"""Which implementations of an op exist, and which one a call gets.

A named backend runs or raises `BackendUnavailable`; it never falls back. Without a name the block's
`use_backend` counts, else the first backend in order of registration that can run the call.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from attnlab.problem import Problem


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and can't run the call; the message gives the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Impl:
    """One implementation of one op.

    `load` imports what it needs and returns the function; it is called at the first use.
    `why_not` returns None if the function can run the problem, else the reason in a sentence.
    A `measurement_only` backend runs when named, and is never chosen without a name.
    """

    op: str
    backend: str
    load: Callable[[], Callable]
    why_not: Callable[[Problem], str | None]
    measurement_only: bool = False


_impls: dict[str, dict[str, Impl]] = {}
_loaded: dict[tuple[str, str], Callable] = {}
# A plain global: a ContextVar can't be traced by torch.compile(fullgraph=True).
_chosen: str | None = None


def register(impl: Impl) -> None:
    """Add an implementation, after those already there in order of preference."""
    of_op = _impls.setdefault(impl.op, {})
    if impl.backend in of_op:
        raise ValueError(f"backend {impl.backend!r} of {impl.op} is registered already")
    of_op[impl.backend] = impl


def list_ops() -> list[str]:
    """Names of the ops that have implementations."""
    return list(_impls)


def list_backends(op: str | None = None) -> list[str]:
    """Names of the backends of an op in order of preference; of all ops without a name."""
    if op is None:
        return list(dict.fromkeys(name for of_op in _impls.values() for name in of_op))
    if op not in _impls:
        raise ValueError(f"expected an op among {', '.join(_impls)}, got {op!r}")
    return list(_impls[op])


def why_not(op: str, backend: str, problem: Problem) -> str | None:
    """Why `backend` can't run the problem, or None if it can."""
    if backend not in list_backends(op):
        return f"{op} has no backend {backend!r}"
    return _impls[op][backend].why_not(problem)


def check_backend_name(backend: str | None) -> None:
    """Raise `ValueError` unless some op has a backend of that name (None is fine)."""
    if backend is not None and not any(backend in of_op for of_op in _impls.values()):
        raise ValueError(f"expected a backend among {', '.join(list_backends())}, got {backend!r}")


def choose(op: str, backend: str | None, problem: Problem) -> str:
    """Name of the backend that a call gets; raises `BackendUnavailable` where none can run it.

    `use_backend` names one backend for several ops, so an op without that backend ignores it.
    """
    check_backend_name(backend)
    name = backend if backend is not None else _chosen
    if backend is None and name not in _impls[op]:
        name = None
    if name is not None:
        reason = why_not(op, name, problem)
        if reason is not None:
            raise BackendUnavailable(f"{op} with backend {name!r}: {reason}")
        return name
    reasons = []
    for candidate, impl in _impls[op].items():
        if impl.measurement_only:
            continue
        reason = impl.why_not(problem)
        if reason is None:
            return candidate
        reasons.append(f"{candidate}: {reason}")
    raise BackendUnavailable(f"no backend can run this {op}; {'; '.join(reasons)}")


def resolve(op: str, backend: str | None, problem: Problem) -> Callable:
    """Function of the backend that a call gets, imported at its first use."""
    key = (op, choose(op, backend, problem))
    if key not in _loaded:
        _loaded[key] = _impls[op][key[1]].load()
    return _loaded[key]


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Let ops called without `backend=` inside the block use `name`, where they have it."""
    global _chosen
    check_backend_name(name)
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before
