"""Ranks as processes that answer calls, for tests: one start a world size, and no test can hang.

A rank that fails or is late ends all ranks of its world; the next call starts them anew. Ranks are
forked from a server that has imported torch once.
"""

import multiprocessing
import pickle
import shutil
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch._dynamo",
        "torch.distributed.checkpoint",
        "attnlab.chunked",
        "attnlab.distributed.parallel",
    ]
)


class RankFailed(AssertionError):
    """What ended a world: the traceback of the first rank that failed, or which were late."""


class World:
    """W ranks with gloo or nccl; `call(function, ...)` runs it on all and returns a result a rank."""

    def __init__(self, size: int, *, backend: str = "gloo", timeout: float = 60.0) -> None:
        self.size, self.backend, self.timeout = size, backend, timeout
        self.ranks, self.pipes = [], []
        self.folder = None

    def call(self, function, *args, **kwargs):
        """Results of `function(rank, size, *args, **kwargs)` by rank."""
        if not self.ranks:
            self._start()
        message = pickle.dumps((function, args, kwargs))
        try:
            for pipe in self.pipes:
                pipe.send_bytes(message)
            return self._collect()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            rank.join()
        for pipe in self.pipes:
            pipe.close()
        self.ranks, self.pipes = [], []
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="attnlab-world-")
        for rank in range(self.size):
            here, there = CONTEXT.Pipe()
            seconds = self.timeout / 2  # a rank that waits gives up before the world does
            args = rank, self.size, self.backend, str(Path(self.folder) / "store"), seconds, there
            process = CONTEXT.Process(target=_serve, args=args, daemon=True)
            process.start()
            there.close()
            self.ranks.append(process)
            self.pipes.append(here)

    def _collect(self) -> list:
        results = [None] * self.size
        waiting = dict(zip(self.pipes, range(self.size), strict=True))
        deadline = time.monotonic() + self.timeout
        while waiting:
            left = deadline - time.monotonic()
            ready = multiprocessing.connection.wait(list(waiting), timeout=max(left, 0))
            if not ready:
                late = sorted(waiting.values())
                raise RankFailed(f"ranks {late} are late: more than {self.timeout} s")
            for pipe in ready:
                rank = waiting.pop(pipe)
                ok, results[rank] = _received(pipe, rank)
                if not ok:
                    raise RankFailed(f"rank {rank}: {results[rank]}")
        return results


def _received(pipe, rank):
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        return False, "ended without an answer"


def _serve(rank: int, size: int, backend: str, store: str, seconds: float, pipe) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # As conftest has it in its own process: `torch.empty` is filled with NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=seconds),
    )
    while True:
        try:
            function, args, kwargs = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = True, function(rank, size, *args, **kwargs)
        except Exception:
            answer = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))
