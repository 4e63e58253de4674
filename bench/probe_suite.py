"""Suite "probe": recall of the ops without training, streamed to the sweep's longest sequence.

See `attnlab.retrieval.probe`. Heads that decay are read by distance; heads that don't, and softmax,
by number of tokens.
"""

import math
from dataclasses import asdict, dataclass

import torch

from attnlab.retrieval.intervals import wilson
from attnlab.retrieval.pairs import READINGS, Stream
from attnlab.retrieval.probe import (
    CHUNK,
    Head,
    Recall,
    minimax_heads,
    probe_lightning,
    probe_softmax,
)
from bench.rows import Row

SHORT_LEN = 1 << 14  # tokens after which all that happens at head dims 32 and 128 has happened
SPARSE_GAP = 256
LOGIT_SCALES = (4.0, 8.0, 12.0)
LEAST_LEN = 1 << 10
DRAW = 512
CALLS = 2e9  # operations that take as long as the calls of a short stream, on a CPU
SOURCES = (
    *("attnlab/retrieval/probe.py", "attnlab/retrieval/pairs.py", "attnlab/retrieval/theory.py"),
    *("attnlab/chunked.py", "attnlab/sdpa.py", "kernels_triton"),
)


@dataclass(frozen=True)
class ProbeUnit:
    """One stream through lightning heads, or through softmax heads.

    Of lightning only those that recall something beyond `beyond` tokens: a fast head has forgotten
    all after its first few tokens, however long the stream.
    """

    op: str
    stream: Stream
    dtype: str
    beyond: int = 0
    suite: str = "probe"

    def title(self) -> str:
        gap = f", a write in {self.stream.write_gap} tokens" if self.stream.write_gap > 1 else ""
        return f"probe {self.op}, {self.stream.num_tokens} tokens, dim {self.stream.head_dim}{gap}"

    def identity(self) -> Row:
        own = {name: getattr(self, name) for name in ("suite", "op", "dtype", "beyond")}
        return own | asdict(self.stream)

    def heads(self) -> list[Head]:
        """Lightning heads whose writes keep at least 1e-3 of their size for `beyond` tokens."""
        return [head for head in minimax_heads() if head.slope * self.beyond < math.log(1e3)]

    def sources(self) -> tuple[str, ...]:
        return SOURCES

    def version(self) -> str:
        return ""

    def work(self) -> float:
        dim, tokens = self.stream.head_dim, self.stream.num_tokens
        heads = len(self.heads()) if self.op == "lightning" else 1
        drawn = DRAW / self.stream.write_gap  # making a pair takes as long as so many products
        return tokens * dim * (heads * dim + drawn) + CALLS

    def series(self) -> str:
        return self.op

    def memory_bytes(self, device: str) -> int:
        """Keys and values of a chunk, copied for each head, a few times over."""
        return 8 * 4 * CHUNK * self.stream.head_dim * max(len(self.heads()), 16)

    def measure(self, device: str) -> list[Row]:
        flags = {"device": device, "dtype": getattr(torch, self.dtype)}
        if self.op == "lightning":
            found = probe_lightning(self.stream, self.heads(), **flags)
        else:
            found = probe_softmax(self.stream, list(LOGIT_SCALES), **flags)
        return [self._row(recall) for recall in found]

    def blank(self) -> list[Row]:
        return [
            self._base()
            | {"q_len": self.stream.num_tokens, "write_gap": self.stream.write_gap, "cell": "all"}
        ]

    def _base(self) -> Row:
        dim = self.stream.head_dim
        return {
            **{"suite": self.suite, "op": self.op, "pass": "recall", "batch": 1},
            **{"head_dim": dim, "value_dim": dim, "dtype": self.dtype, "input": "random"},
        }

    def _row(self, recall: Recall) -> Row:
        low, high = wilson(recall.correct, recall.n)
        named = recall.layer is not None
        cell = f"{recall.slope} {'log' if recall.per_log_length else recall.logit_scale}"
        return self._base() | {
            "status": "ok",
            "q_len": recall.num_tokens,
            "distance": recall.distance,
            "write_gap": recall.write_gap,
            "layer": f"{recall.layer}/80" if named else None,
            "head": recall.head,
            "slope": recall.slope,
            "logit_scale": recall.logit_scale,
            "per_log_length": recall.per_log_length,
            "n": recall.n,
            "correct": recall.correct,
            "wilson_lo": low,
            "wilson_hi": high,
            "margin": recall.margin,
            "predicted": recall.predicted,
            "cell": cell,
        }


def units(max_len: int, dtype: str) -> list[ProbeUnit]:
    """Streams to `max_len` tokens, the short ones first; none if that is too short to say anything."""
    if max_len < LEAST_LEN:
        return []
    short = min(max_len, SHORT_LEN)
    found = [
        ProbeUnit("lightning", Stream(num_tokens=short, head_dim=dim), dtype)
        for dim in (32, 64, 128)
    ]
    found.append(ProbeUnit("softmax", Stream(num_tokens=short), dtype))
    if max_len > short:
        found.append(ProbeUnit("lightning", Stream(num_tokens=max_len), dtype, beyond=SHORT_LEN))
        found.append(ProbeUnit("softmax", Stream(num_tokens=max_len), dtype))
    if max_len >= 2 * READINGS * SPARSE_GAP:
        sparse = Stream(num_tokens=max_len, write_gap=SPARSE_GAP)
        found.append(ProbeUnit("lightning", sparse, dtype, beyond=SPARSE_GAP))
    return found
