"""What was read of a tensor on a device is remembered as long as it is true, and no longer."""

import gc

import pytest
import torch

from attnlab import checks


class OnDevice(torch.Tensor):
    """Stands for a tensor whose values must be fetched."""

    is_cpu = False


@pytest.fixture
def reads():
    """Values that were fetched, in order."""
    return []


@pytest.fixture
def read(reads):
    def read(host_copy):
        reads.append(host_copy.tolist())
        return tuple(reads[-1])

    return read


def on_device(*values):
    return torch.tensor(values).as_subclass(OnDevice)


def test_values_are_fetched_once(reads, read):
    x = on_device(1, 2)
    assert checks.recall(x, read) is None
    assert checks.remembered(x, read) == checks.remembered(x, read) == checks.recall(x, read)
    assert reads == [[1, 2]]


def test_a_change_in_place_is_seen(reads, read):
    x = on_device(1, 2)
    checks.remembered(x, read)
    x.add_(1)
    assert checks.recall(x, read) is None
    assert checks.remembered(x, read) == (2, 3)
    assert reads == [[1, 2], [2, 3]]


def test_two_readings_of_a_tensor_are_kept_apart(read):
    x = on_device(3, 4)
    assert checks.remembered(x, read) == (3, 4)
    assert checks.remembered(x, torch.sum) == 7
    assert checks.recall(x, read) == (3, 4)


def test_a_tensor_that_died_is_forgotten(read):
    gc.collect()
    before = len(checks._memories)
    x = on_device(1)
    checks.remembered(x, read)
    assert len(checks._memories) == before + 1
    del x
    assert len(checks._memories) == before


def test_what_has_no_version_or_may_share_memory_is_read_anew(reads, read):
    with torch.inference_mode():
        for x in (on_device(5), torch.tensor([5])):
            checks.remembered(x, read), checks.remembered(x, read)
    assert reads == [[5]] * 4
