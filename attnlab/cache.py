"""What a model keeps of the tokens it has seen: keys and values, or states of a fixed size.

Legend: B sequences (rows), H heads, C slots a row, K key dim, V value dim, D hidden size, W taps.

Token n of a sequence lies in slot n of its row, whatever padding it arrived with. All tensors keep
their place in memory from call to call, so that a CUDA graph may hold on to them, and what decides
shapes is known on the host: nothing here waits for the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from attnlab.checks import expect


class KVCache:
    """Keys and values of one softmax attention layer, `[B, H, C, K]` and `[B, H, C, V]`.

    `conv_inputs` `[B, W-1, D]` are the last inputs of the layer's convolution, None without one.
    """

    def __init__(self, keys: Tensor, values: Tensor, conv_inputs: Tensor | None = None) -> None:
        """Take over tensors that hold zeros: a masked slot's weight is 0, and 0 x NaN is NaN."""
        self.keys, self.values, self.conv_inputs = keys, values, conv_inputs

    def tensors(self) -> list[Tensor]:
        """All tensors, rows first."""
        return _present(self.keys, self.values, self.conv_inputs)

    def store(self, key: Tensor, value: Tensor, start: int) -> None:
        """Write `[B, H, T, D]` to the slots from `start` on, the same in every row."""
        stop = start + key.shape[2]
        self.keys[:, :, start:stop] = key
        self.values[:, :, start:stop] = value

    def store_at(self, key: Tensor, value: Tensor, rows: Tensor, slots: Tensor) -> None:
        """Write token `[b, :, t]` of `[B, H, T, D]` to row `rows[b, t]`, slot `slots[b, t]`."""
        for cached, new in ((self.keys, key), (self.values, value)):
            tokens = new.transpose(1, 2).to(cached.dtype)  # [B, T, H, D]
            cached.transpose(1, 2).index_put_((rows, slots), tokens)


class StateCache:
    """State `[B, H, K, V]` float32 of one lightning attention layer, whatever the model's dtype.

    `conv_inputs` `[B, W-1, D]` are the last inputs of the layer's convolution, None without one.
    """

    def __init__(self, state: Tensor, conv_inputs: Tensor | None = None) -> None:
        """Take over tensors that hold zeros."""
        self.state, self.conv_inputs = state, conv_inputs

    def tensors(self) -> list[Tensor]:
        """All tensors, rows first."""
        return _present(self.state, self.conv_inputs)


LayerCache = KVCache | StateCache


class ModelCache:
    """Caches of all layers for a batch of sequences, and how many tokens each has seen.

    `lengths` `[B]` int64 lives on the device and `host_lengths` says the same on the host.
    """

    def __init__(self, layers: Sequence[LayerCache], lengths: Tensor, capacity: int) -> None:
        """Take over empty layer caches; `capacity` is the number of slots in a row."""
        self.layers = list(layers)
        self.lengths = lengths
        self.capacity = capacity
        self.host_lengths = [0] * lengths.shape[0]

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.host_lengths)

    @property
    def max_len(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.host_lengths)

    @property
    def span(self) -> int:
        """Slots that hold all tokens after one more step, also after each replay of a captured one."""
        return self.capacity if self._is_capturing() else self.max_len + 1

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.numel() * x.element_size() for x in self._tensors())

    def check_room(self, counts: Sequence[int]) -> None:
        """Raise `ValueError` unless `counts[b]` more tokens fit into row b; nothing is written."""
        expect(len(counts) == self.batch, f"{self.batch} sequences, one a row", len(counts))
        for row, (old, new) in enumerate(zip(self.host_lengths, counts, strict=True)):
            if old + new > self.capacity:
                raise ValueError(
                    f"expected at most {self.capacity} tokens a row of the cache, got "
                    f"{old} + {new} in row {row}"
                )

    def advance(self, counts: Sequence[int], device_counts: Tensor | int) -> None:
        """Count tokens that all layers have stored: on the host, and in `lengths`."""
        self.lengths += device_counts
        # While a graph is captured nothing runs, so nothing is stored: see `count_replay`.
        if not self._is_capturing():
            self.host_lengths = [a + b for a, b in zip(self.host_lengths, counts, strict=True)]

    def count_replay(self, num_tokens: int = 1) -> None:
        """Count on the host what the replay of a captured step stores in every row.

        Call it before the replay: where there is no room it raises `ValueError`.
        """
        self.check_room([num_tokens] * self.batch)
        self.host_lengths = [n + num_tokens for n in self.host_lengths]

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Forget the sequences of some rows, or of all.

        Raises:
            ValueError: if there is no such row.
        """
        chosen = list(range(self.batch)) if rows is None else self._checked_rows(rows)
        for x in self._tensors():
            for part in [x] if rows is None else [x[row] for row in chosen]:
                part.zero_()
        for row in chosen:
            self.host_lengths[row] = 0

    def reorder(self, index: Sequence[int] | Tensor) -> None:
        """Let row b go on from what row `index[b]` has seen; a row may be taken more than once.

        Raises:
            ValueError: unless there is one existing row for each row.
        """
        rows = self._checked_rows(index.tolist() if isinstance(index, Tensor) else index)
        expect(len(rows) == self.batch, f"{self.batch} rows", len(rows))
        for x in self._tensors():
            x.copy_(x[torch.tensor(rows, device=x.device)])
        self.host_lengths = [self.host_lengths[row] for row in rows]

    def _is_capturing(self) -> bool:
        return self.lengths.is_cuda and torch.cuda.is_current_stream_capturing()

    def _tensors(self) -> list[Tensor]:
        return [self.lengths, *(x for layer in self.layers for x in layer.tensors())]

    def _checked_rows(self, rows: Sequence[int]) -> list[int]:
        wrong = [row for row in rows if not 0 <= row < self.batch]
        expect(not wrong, f"rows in [0, {self.batch})", wrong[:4])
        return list(rows)


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [x for x in tensors if x is not None]
