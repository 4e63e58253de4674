import time

import pytest
import torch

from bench import timing


class Clock:
    """A clock that moves only when a call spends time."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def spend(self, seconds):
        def call():
            self.now += seconds

        return call


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def measure(call, budget_s):
    return timing.measure(call, device="cpu", working_set_bytes=0, budget_s=budget_s)


def test_a_long_call_is_timed_three_times(clock):
    timed = measure(clock.spend(2.0), budget_s=100)
    assert timed.samples == pytest.approx([2000.0] * 3)
    assert timed.timer == "wall" and not timed.l2_flush


def test_a_long_call_is_timed_once_where_the_budget_allows_no_more(clock):
    assert len(measure(clock.spend(2.0), budget_s=3).samples) == 1


def test_a_short_call_is_warmed_up_and_sampled_for_half_a_second(clock):
    calls = []
    spend = clock.spend(0.01)

    def call():
        calls.append(clock.now)
        spend()

    timed = measure(call, budget_s=100)
    assert sum(timed.samples) == pytest.approx(510, abs=11)
    assert len(calls) - len(timed.samples) >= timing.WARM_UP_CALLS


def test_a_call_that_was_held_up_counts_as_warm_up(clock):
    durations = iter([40.0, 30.0] + [2.0] * 10)

    def call():
        clock.now += next(durations)

    timed = timing.measure(call, device="cpu", working_set_bytes=0, budget_s=100, expected_s=2.0)
    assert timed.samples == pytest.approx([2000.0] * 3)


def test_a_call_that_is_slower_than_expected_is_timed_all_the_same(clock):
    calls = []

    def call():
        calls.append(clock.now)
        clock.now += 5.0

    timed = timing.measure(call, device="cpu", working_set_bytes=0, budget_s=100, expected_s=2.0)
    assert timed.samples == pytest.approx([5000.0] * 3) and len(calls) == 2 + 3


def test_samples_have_an_upper_bound(clock):
    assert len(measure(clock.spend(1e-5), budget_s=100).samples) == timing.MAX_SAMPLES


@pytest.mark.parametrize(
    ("took", "graph", "tried"),
    [([3e-4, 15e-6], True, 2), ([15e-6], True, 1), ([3e-4] * 3, False, 3), ([0.1], False, 1)],
)
def test_one_launch_that_is_held_up_does_not_keep_a_short_call_from_its_graph(
    monkeypatch, took, graph, tried
):
    left = iter(took)
    monkeypatch.setattr(timing, "cache_flush", lambda _: None)
    monkeypatch.setattr(timing, "_event_sample", lambda *_: next(left))
    monkeypatch.setattr(timing, "_graph_timing", lambda *_: "graph")
    monkeypatch.setattr(timing, "_sample", lambda *_: "event")
    found = timing.measure(None, device="cuda", working_set_bytes=0, budget_s=1.0)
    assert found == ("graph" if graph else "event")
    assert len(took) - len(list(left)) == tried


def test_sustained_time_is_that_of_the_last_third(monkeypatch):
    passed = [0.0]  # seconds, in which calls get slower from 10 to 20 ms

    def call():
        passed[0] += 0.01 if passed[0] < 0.6 else 0.02

    def event_sample(run, flush):
        before = passed[0]
        run()
        return passed[0] - before

    monkeypatch.setattr(timing.time, "perf_counter", lambda: passed[0])
    monkeypatch.setattr(timing, "_event_sample", event_sample)
    assert timing.sustained_ms(call, 1.0) == pytest.approx(20.0)
    assert 1.0 <= passed[0] < 1.2


def test_the_cache_is_flushed_unless_the_data_is_far_larger(monkeypatch):
    properties = type("Properties", (), {"L2_cache_size": 1000})
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda: properties)
    buffers, empty = [], torch.empty

    def on_cpu(size, dtype, device):
        buffers.append(empty(size, dtype=dtype).fill_(1))
        return buffers[-1]

    monkeypatch.setattr("torch.empty", on_cpu)
    assert timing.cache_flush(4000) is None and not buffers
    flush = timing.cache_flush(3999)
    assert flush() is None and buffers[0].numel() == 2000 and not buffers[0].any()


def test_statistics_are_those_of_the_samples():
    timed = timing.Timing([float(x) for x in range(1, 102)], "wall", False)
    found = timed.statistics()
    assert (found["ms_q1"], found["ms_median"], found["ms_q3"]) == (26.0, 51.0, 76.0)
    assert found["ms_lo"] < 51.0 < found["ms_hi"] and found["ms_hi"] - found["ms_lo"] < 30
    assert len(found["samples"]) == 101


def test_the_floor_is_the_larger_of_both_limits():
    ceilings = timing.Ceilings(copy_gbps=100.0, matmul_tflops=1.0)
    assert ceilings.floor_ms(flops=10**9, num_bytes=10**6) == (1.0, "compute")
    assert ceilings.floor_ms(flops=10**6, num_bytes=10**9) == (10.0, "memory")
