"""Streams that run their operations in order: when each starts, and how much of it is not hidden.

A GPU runs kernels in order on its compute stream, and each process group runs its collectives in
order on a stream of its own (MiniMax-01, arXiv 2501.08313, section 3.1). An operation starts when
it has been issued, its stream is free, and what it needs has ended.

The experts' work is cut into groups of tokens, with five stages a group: D sends rows to the ranks
of their experts (ep), A gathers them over the ranks that share an expert (etp), X computes, R sums
and scatters over etp, Y returns rows over ep. `moe_schedule` is the order in which they are issued;
`attnlab.distributed.moe` runs the same one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from attnlab.checks import expect

STAGES = "DAXRY"
_STREAM = {"D": "ep", "Y": "ep", "A": "etp", "R": "etp", "X": "compute"}
_BEFORE = {"A": "D", "X": "A", "R": "X", "Y": "R"}
_WAITED_BY = {"A": "D", "X": "A", "Y": "R"}  # which stage waits for which collective


class Step(NamedTuple):
    """One stage of one group of tokens."""

    stage: str
    group: int


@dataclass(frozen=True)
class Op:
    """An operation of `duration` on a stream, after others that are named."""

    name: Step
    stream: str
    duration: float
    after: tuple[Step, ...] = ()


class Interval(NamedTuple):
    """When an operation runs."""

    start: float
    end: float


def simulate(ops: Iterable[Op], *, launch: float = 0.0) -> dict[Step, Interval]:
    """When each of `ops` runs, in their order of issue, each issued `launch` after the last."""
    free: dict[str, float] = {}
    found: dict[Step, Interval] = {}
    issued = 0.0
    for op in ops:
        issued += launch
        ready = max((found[name].end for name in op.after), default=0.0)
        start = max(issued, ready, free.get(op.stream, 0.0))
        found[op.name] = Interval(start, start + op.duration)
        free[op.stream] = start + op.duration
    return found


def moe_schedule(num_groups: int, lookahead: int = 1) -> list[Step]:
    """Order in which stages are issued, `lookahead` groups sent before the first is computed.

    A group returns after the next one's sending is issued: the other way round its way back, which
    waits for its experts, would hold up the queue.

    Raises:
        ValueError: for less than one group or one group ahead.
    """
    expect(num_groups >= 1, "at least one group of tokens", num_groups)
    expect(lookahead >= 1, "a lookahead of at least one group", lookahead)
    order = [Step("D", g) for g in range(min(lookahead, num_groups))]
    for g in range(num_groups):
        order += [Step("A", g), Step("X", g)]
        if g + lookahead < num_groups:
            order.append(Step("D", g + lookahead))
        if g:
            order += [Step("R", g - 1), Step("Y", g - 1)]
    return [*order, Step("R", num_groups - 1), Step("Y", num_groups - 1)]


def moe_backward_schedule(num_groups: int, lookahead: int = 1) -> list[Step]:
    """Order in which the backward issues the gradients of the stages.

    A collective's gradient starts where the forward waited for it, and the backward goes through the
    forward from its end: so Y's of all groups come first, then the groups, the last one first.
    """
    forward: list[Step] = []
    for stage, group in moe_schedule(num_groups, lookahead):
        forward += [Step(_WAITED_BY[stage], group)] if stage in _WAITED_BY else []
        forward += [Step("X", group)] if stage == "X" else []
    forward += [Step("Y", group) for group in range(num_groups)]
    return forward[::-1]


def moe_ops(
    order: Iterable[Step],
    times: Mapping[str, float],
    *,
    one_queue: bool = False,
    backward: bool = False,
) -> list[Op]:
    """The stages as operations, `times` for a group; `one_queue` puts etp's on ep's stream."""
    before = {b: a for a, b in _BEFORE.items()} if backward else _BEFORE
    ops = []
    for step in order:
        stream = _STREAM[step.stage]
        if one_queue and stream == "etp":
            stream = "ep"
        needs = (Step(before[step.stage], step.group),) if step.stage in before else ()
        ops.append(Op(step, stream, times[step.stage], needs))
    return ops


def makespan(
    total: Mapping[str, float],
    num_groups: int,
    *,
    lookahead: int = 1,
    one_queue: bool = False,
    launch: float = 0.0,
    loss: float = 0.0,
    backward: bool = False,
) -> float:
    """Time of the experts' work, cut into equal groups, from the `total` time of each stage.

    `loss` is the share by which every group more slows the products down.
    """
    times = {stage: time / num_groups for stage, time in total.items()}
    times["X"] *= 1 + loss * (num_groups - 1)
    schedule = moe_backward_schedule if backward else moe_schedule
    order = schedule(num_groups, lookahead)
    ops = moe_ops(order, times, one_queue=one_queue, backward=backward)
    return max(interval.end for interval in simulate(ops, launch=launch).values())


def exposed(total: Mapping[str, float], num_groups: int, **flags: float | bool) -> float:
    """Share of the communication's time that is not hidden behind the experts' products."""
    sent = sum(time for stage, time in total.items() if stage != "X")
    return (makespan(total, num_groups, **flags) - total["X"]) / sent  # type: ignore[arg-type]
