"""The tests' own ranks never hang: one that fails, ends or is late ends all of them."""

import time

import psutil
import pytest
from distributed_cases import run_failing
from distributed_world import RankFailed, World


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
