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
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from attnlab.distributed.comm import Ledger
from attnlab.distributed.mesh import Layout, Meshes

LOST = "a rank was lost"
_SECONDS_TO_TELL = 10
_SIGNS = ("connection", "timed out", "timeout", "gloo", "nccl", "peer", "socket")


@contextmanager
def job(
    *,
    dp: int | None = None,
    cp: int = 1,
    tp: int = 1,
    ep: int = 1,
    etp: int = 1,
    timeout: timedelta = timedelta(minutes=10),
    ledger: Ledger | None = None,
) -> Iterator[Meshes]:
    """Join the job: NCCL where there are GPUs, else gloo; without `dp` replicas take what is left.

    A wrong argument, which all ranks see alike, ends the job with code 2 and one message of rank 0;
    a lost rank with code 1 and one message of those that are left, at most `timeout` later. To be
    called in the main thread; a SIGTERM ends a rank within 10 seconds, unless the caller handles it.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    _init("nccl" if cuda else "gloo", timeout)
    before = signal.signal(signal.SIGTERM, _end_soon)
    try:
        world = dist.get_world_size()
        layout = Layout(
            world_size=world, dp=dp or max(1, world // (cp * tp)), cp=cp, tp=tp, ep=ep, etp=etp
        )
        yield Meshes(layout, "cuda" if cuda else "cpu", ledger)
    except ValueError as error:
        if dist.get_rank() == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        _leave(2)
    except RuntimeError as error:
        if not _is_lost_rank(error):
            raise
        if _is_first_to_tell():
            text = (
                f"{LOST}: the job ends; the last checkpoint is whole, start again to go on from it"
            )
            print(f"error: {text} ({_first_sentence(error)})", file=sys.stderr, flush=True)
        _leave(1)
    else:
        dist.destroy_process_group()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGTERM, before)


def _end_soon(number: int, frame: FrameType | None) -> None:
    """torchrun ends the other ranks when one is lost: leave them time to meet the loss and tell it."""
    signal.alarm(_SECONDS_TO_TELL)


def _init(backend: str, timeout: timedelta) -> None:
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


def _is_first_to_tell() -> bool:
    """Whether no other rank has told of the loss; also if the ranks can't agree any more."""
    try:
        store = dist.distributed_c10d._get_default_store()
        return store.add("attnlab/lost", 1) == 1
    except RuntimeError:
        return True


def _leave(code: int) -> None:
    """End without waiting for other ranks, whose collectives will never come."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
