"""Virtual time: what a run would take on streams that work beside each other.

On two cores, communication and products cannot overlap, whatever order they are issued in. So the
real program moves real data, and beside it each rank keeps a clock a stream: a stage starts when its
stream is free and what it needs has ended, as in `streams.simulate`; a collective starts when all
its ranks are ready, which they tell each other in a message of one number. The clocks depend on the
order of issue, the rows and the rates alone, and so repeat exactly.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from attnlab.distributed.comm import Group
from attnlab.distributed.streams import Interval, Op, Step, moe_ops


@dataclass
class VirtualTime:
    """Clocks of one rank: `row_time` seconds a row of products, `latency` and `rate` of a message."""

    row_time: float
    latency: float
    rate: float
    intervals: dict[Step, Interval] = field(default_factory=dict)
    _free: dict[str, float] = field(default_factory=dict)

    @property
    def end(self) -> float:
        """When everything so far has ended."""
        return max((interval.end for interval in self.intervals.values()), default=0.0)

    def busy(self, stage: str) -> float:
        """Time that a stage of all groups took."""
        return sum(b - a for step, (a, b) in self.intervals.items() if step.stage == stage)

    def compute(self, step: Step, num_rows: int) -> None:
        """Run products of so many rows on the compute stream."""
        op = self._op(step)
        start = self._ready(op)
        self._set(op, start, start + num_rows * self.row_time)

    def collective(self, step: Step, group: Group, received_bytes: int) -> None:
        """Run a collective: it starts and ends for all ranks of the group when the last can."""
        op = self._op(step)
        duration = self.latency + received_bytes / self.rate if group.size > 1 else 0.0
        start, longest = self._agree(group, self._ready(op), duration)
        self._set(op, start, start + longest)

    def _op(self, step: Step) -> Op:
        return moe_ops([step], {step.stage: 0.0})[0]

    def _ready(self, op: Op) -> float:
        ready = max((self.intervals[name].end for name in op.after), default=0.0)
        return max(ready, self._free.get(op.stream, 0.0))

    def _set(self, op: Op, start: float, end: float) -> None:
        self.intervals[op.name] = Interval(start, end)
        self._free[op.stream] = end

    def _agree(self, group: Group, ready: float, duration: float) -> tuple[float, float]:
        """The latest start and the longest duration of the group's ranks."""
        if group.size == 1:
            return ready, duration
        latest = torch.tensor([ready, duration], dtype=torch.float64, device=group.device)
        dist.all_reduce(latest, op=dist.ReduceOp.MAX, group=group.process_group)
        start, longest = latest.tolist()
        return start, longest
