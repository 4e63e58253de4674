"""CUDA streams for the queues of the experts' work, so that a stage starts as `streams` says.

A collective that is issued on a stream starts behind all that was issued there before. If every
stage were issued on one stream, the rows of the next group could not leave before the products of
this one had ended. So each process group's collectives, and what prepares them, are issued on a
stream of their own, which waits for what the stage needs and for nothing else. Autograd runs a
backward on the stream of its forward, so the gradients' stages lie on the same streams.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from attnlab.distributed.streams import Step, moe_ops


class Queues:
    """Where the stages of one pass are issued; on a CPU simply in order."""

    def __init__(self, device: torch.device) -> None:
        """Begin behind all that the current stream has to do."""
        self._ended: dict[Step, torch.cuda.Event] = {}
        self._streams: dict[str, torch.cuda.Stream] = {}
        if device.type == "cuda":
            main = torch.cuda.current_stream(device)
            self._streams = {"compute": main, **_side_streams(device)}
            for stream in self._streams.values():
                if stream is not main:
                    stream.wait_stream(main)

    @contextmanager
    def on(self, step: Step) -> Iterator[None]:
        """Issue a stage on its queue's stream, behind the stage that it needs."""
        if not self._streams:
            yield
            return
        (op,) = moe_ops([step], {step.stage: 0.0})
        stream = self._streams[op.stream]
        for before in op.after:
            stream.wait_event(self._ended[before])
        with torch.cuda.stream(stream):
            yield
        self._ended[step] = stream.record_event()

    def join(self, step: Step) -> None:
        """Let the current stream wait for a stage."""
        if self._streams:
            self._streams["compute"].wait_event(self._ended[step])


@cache
def _side_streams(device: torch.device) -> dict[str, torch.cuda.Stream]:
    return {name: torch.cuda.Stream(device) for name in ("ep", "etp")}
