"""The streams of the experts' stages: what each waits for is what the simulation says, no more."""

import contextlib

import pytest
import torch

from attnlab.distributed import moe, queues
from attnlab.distributed.comm import Group
from attnlab.distributed.routing import route
from attnlab.distributed.streams import Op, Step, makespan, moe_ops, moe_schedule, simulate


class Stream:
    """Stands for a CUDA stream; an event is the name of the last thing before it."""

    def __init__(self, name, log):
        self.name, self.log, self.waits = name, log, []

    def wait_stream(self, other):
        self.log.append((self.name, "start", other.name))

    def wait_event(self, event):
        self.waits.append(event)

    def record_event(self):
        return self.log[-1][1]


@pytest.fixture
def issued(monkeypatch):
    """Stages by stream in the order of their issue, each with the stages that it waits for."""
    log, original = [], queues.Queues.on
    streams = {name: Stream(name, log) for name in ("compute", "ep", "etp")}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams["compute"])
    monkeypatch.setattr(
        queues, "_side_streams", lambda device: {n: streams[n] for n in ("ep", "etp")}
    )

    @contextlib.contextmanager
    def enter(stream):
        yield stream
        log.append((stream.name, current[0], tuple(stream.waits)))
        stream.waits.clear()

    current = [None]

    @contextlib.contextmanager
    def on(self, step):
        current[0] = step
        with original(self, step):
            yield

    monkeypatch.setattr(torch.cuda, "stream", enter)
    monkeypatch.setattr(queues.Queues, "on", on)
    monkeypatch.setattr(moe, "Queues", lambda device: queues.Queues(torch.device("cuda")))
    return log


def mix(num_groups):
    generator = torch.Generator().manual_seed(0)
    x, router = torch.randn(20, 6, generator=generator), torch.randn(4, 6, generator=generator)
    chosen, _ = route(x, router, 2, Group(None))
    shard = moe.shard_experts(torch.randn(4, 8, 6), torch.randn(4, 6, 4), Group(None), Group(None))
    return moe.mix_experts(x, chosen, shard, Group(None), Group(None), num_groups=num_groups)


@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_a_stage_waits_for_what_it_needs_and_for_nothing_else(issued, num_groups):
    mix(num_groups)
    assert issued[:2] == [("ep", "start", "compute"), ("etp", "start", "compute")]
    wanted = moe_ops(moe_schedule(num_groups), dict.fromkeys("DAXRY", 1.0))
    assert issued[2:] == [(op.stream, op.name, op.after) for op in wanted]
    ran = simulate([Op(step, stream, 1.0, after) for stream, step, after in issued[2:]])
    end = max(interval.end for interval in ran.values())
    assert end == makespan(dict.fromkeys("DAXRY", float(num_groups)), num_groups)


def test_what_is_returned_waits_for_the_way_back(issued, monkeypatch):
    joined, original = [], queues.Queues.join

    def join(self, step):
        original(self, step)
        joined.append(self._streams["compute"].waits[-1])

    monkeypatch.setattr(queues.Queues, "join", join)
    mix(3)
    assert joined == [Step("Y", group) for group in range(3)]
