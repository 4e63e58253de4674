"""The tests' own ranks never hang, and nothing that is not a number passes for a small error."""

import time

import psutil
import pytest
import torch
from distributed_cases import largest, run_empty, run_failing, worst
from distributed_world import RankFailed, World

from attnlab.distributed.pack import PackPlan


@pytest.fixture
def world():
    world = World(3, timeout=20)
    yield world
    world.close()


@pytest.mark.parametrize(
    "how, words", [("raises", "planted"), ("ends", "rank"), ("sleeps", "late")]
)
def test_a_rank_that_fails_ends_its_world_which_starts_anew(world, how, words):
    pids = world.call(run_failing, "not at all")
    world.timeout = 3 if how == "sleeps" else 20
    start = time.monotonic()
    with pytest.raises(RankFailed, match=words):
        world.call(run_failing, how)
    assert time.monotonic() - start < 15
    assert not any(psutil.pid_exists(pid) for pid in pids)
    world.timeout = 20
    assert len(set(world.call(run_failing, "not at all"))) == 3


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_an_error_that_is_not_finite_is_the_largest(place, value):
    plan = PackPlan.contiguous((0, 4), 1)
    wanted = [torch.zeros(1, 1, 4, 2, dtype=torch.float64) for _ in range(2)]
    parts = [x.clone() for x in wanted]
    assert worst(plan, 0, parts, wanted) == largest([]) == 0
    parts[0][0, 0, 0] = -3
    assert worst(plan, 0, parts, wanted) == 3
    parts[place][0, 0, 2] = value
    assert worst(plan, 0, parts, wanted) == torch.inf


def test_memory_of_the_ranks_holds_nan_until_it_is_written(worlds):
    assert all(x.isnan().all() for x in worlds(2).call(run_empty))
