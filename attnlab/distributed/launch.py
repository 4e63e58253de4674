"""A rank's part in a job that torchrun started: joining it, and leaving it with words.

On one machine with 8 GPUs:
    torchrun --nproc-per-node 8 SCRIPT
On several, the same on each, with the address of the first:
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 SCRIPT
Without torchrun a script is a job of one rank.
"""

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist

from attnlab.checks import expect
from attnlab.distributed.comm import Group, Ledger, check_agreement
from attnlab.distributed.mesh import Layout, Meshes
from attnlab.registry import BackendUnavailable

LOST = "a rank was lost"
_SECONDS_TO_TELL = 10
_SIGNS = ("connection", "timed out", "timeout", "gloo", "nccl", "peer", "socket")
_EXPECTED = (ValueError, OSError, ArithmeticError, BackendUnavailable)

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """The ranks that work together, of torch's default group, all on a "cpu" or "cuda" device."""

    device_type: str

    @property
    def leads(self) -> bool:
        """Whether this is the rank that speaks and writes for all."""
        return dist.get_rank() == 0

    def meshes(
        self,
        *,
        dp: int | None = None,
        cp: int = 1,
        tp: int = 1,
        ep: int = 1,
        etp: int = 1,
        ledger: Ledger | None = None,
    ) -> Meshes:
        """The ranks in their two views; without `dp`, replicas take what is left.

        Raises:
            ValueError: on all ranks, for numbers that don't factor the job.
        """
        size = dist.get_world_size()
        dp = dp or max(1, size // (cp * tp))
        layout = Layout(world_size=size, dp=dp, cp=cp, tp=tp, ep=ep, etp=etp)
        return Meshes(layout, self.device_type, ledger)

    def of_first(self, value: T) -> T:
        """Rank 0's value, on all ranks."""
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def check_same(self, text: str, what: str) -> None:
        """Raise `ValueError` on all ranks unless `text` is the same on all of them."""
        check_agreement(Group(dist.group.WORLD), text, what)


@contextmanager
def joined(device: str | None = None) -> Iterator[Job | None]:
    """The job that torchrun started, as `job` joins it; None for a process of its own."""
    if "RANK" not in os.environ:
        yield None
        return
    with job(device) as ranks:
        yield ranks


@contextmanager
def job(device: str | None = None, *, timeout: timedelta = timedelta(minutes=10)) -> Iterator[Job]:
    """Join the job: NCCL for "cuda", gloo for "cpu"; without `device`, NCCL where there are GPUs.

    A wrong argument, which all ranks see alike, ends the job with code 2, a file that can't be
    written or numbers that are not finite with code 1, a lost rank with code 1 at most `timeout`
    later; each with one message, of the rank that is the first to tell. To be called in the main
    thread; a SIGTERM ends a rank within 10 seconds, unless the caller handles it.
    """
    cuda = device.startswith("cuda") if device else torch.cuda.is_available()
    before = signal.signal(signal.SIGTERM, _end_soon)
    try:
        _join(cuda, timeout)
        yield Job("cuda" if cuda else "cpu")
    except _EXPECTED as error:
        _tell(str(error))
        _leave(2 if isinstance(error, ValueError) else 1)
    except RuntimeError as error:
        if not _is_lost_rank(error):
            raise
        text = f"{LOST}: the job ends; the last checkpoint is whole, start again to go on from it"
        _tell(f"{text} ({_first_sentence(error)})")
        _leave(1)
    else:
        dist.destroy_process_group()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGTERM, before)


def _end_soon(number: int, frame: FrameType | None) -> None:
    """torchrun ends the other ranks when one is lost: leave them time to meet the loss and tell it."""
    signal.alarm(_SECONDS_TO_TELL)


def _join(cuda: bool, timeout: timedelta) -> None:
    if cuda:
        there, wanted = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        expect(wanted <= there, f"at most {there} ranks on this machine, one a GPU", wanted)
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    backend = "nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
        return
    store = Path(tempfile.mkdtemp()) / "store"
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=0, world_size=1, timeout=timeout
    )


def _is_lost_rank(error: RuntimeError) -> bool:
    """Whether an error is that of a connection; anything else is a defect and keeps its traceback."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(sign in text for sign in _SIGNS)


def _first_sentence(error: RuntimeError) -> str:
    return str(error).splitlines()[0].split(". ")[0]


def _tell(text: str) -> None:
    if _is_first_to_tell():
        print(f"error: {text}", file=sys.stderr, flush=True)


def _is_first_to_tell() -> bool:
    """Whether no other rank has told why the job ends; also if the ranks can't agree any more."""
    try:
        store = dist.distributed_c10d._get_default_store()
        return store.add("attnlab/told", 1) == 1
    except (RuntimeError, ValueError):  # the latter before the ranks have joined
        return True


def _leave(code: int) -> None:
    """End without waiting for other ranks, whose collectives will never come."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
