"""The settings of a run, and the lab model that they name."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from attnlab.checks import expect
from attnlab.model.config import SIZES, HybridConfig
from attnlab.training.tokenizer import Tokenizer

VARIANTS = ("hybrid", "softmax", "lightning")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MESH = ("dp", "cp", "tp", "ep", "etp")
PLACE = (*MESH, "num_groups", "zigzag", "device")
"""Fields that say where a run goes on, not what it computes: a resumed run may have others."""
LEARNING_RATES = {"tiny": 4e-3, "3m": 4e-3, "15m": 2e-3, "100m": 1e-3}
ON_A_GPU = {
    "batch_tokens": 131072,
    "pack_len": 65536,
    "seq_len": 8192,
    "dtype": "bfloat16",
    "log_every": 10,
    "validation_tokens": 1 << 20,
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All settings of a run. The defaults are for the 3M size on two CPU cores; `for_device` knows others.

    out: folder of the run
    size: lab size of the model
    variant: which mixers it has: hybrid, softmax or lightning
    vocab_size: of the model; without it, that of the lab size
    tokenizer: "bytes", or the path of a tokenizer.json
    corpus: files and folders; without any, the sources of Python's standard library
    validation_share: share of the documents kept for validation
    steps: optimiser steps
    batch_tokens: tokens of a step, in one or more packs
    pack_len: tokens of a pack, that is of one forward pass
    seq_len: tokens of the longest piece of a document
    learning_rate: its peak
    warmup_steps: steps over which it rises
    decay_share: share of the steps over which it falls at the end
    weight_decay: of matrices
    clip_norm: largest norm of a step's gradient
    linear_ramp: value, begin, end: factor on the output of linear mixers, which is the value until \
the share begin of the steps and 1 from the share end on
    dtype: float32, or bfloat16 with float32 masters
    device: cpu, cuda or cuda:N; without it, a GPU if there is one
    dp: under torchrun: replicas, which share out the packs of a step; without it, what is left
    cp: ranks that share a pack, each with a part of its tokens
    tp: ranks that share the heads of a mixer
    ep: ranks that share a layer's experts
    etp: ranks that share each expert's channels
    num_groups: groups of tokens whose way to the experts overlaps the experts' work
    zigzag: two chunks of a pack for each cp rank, which evens out long documents
    lightning_backend: backend of lightning layers; without it, the first that can run
    softmax_backend: backend of softmax layers; likewise
    gradient_checkpointing: keep few activations and compute them again
    compile: run each layer through torch.compile
    seed: of the weights and of the order of the data
    log_every: steps between two reads of the loss, each of which waits for the device
    validate_every: steps between two validations
    validation_tokens: tokens of a validation
    checkpoint_every: steps between two checkpoints
    keep_checkpoints: how many of them stay
    """

    out: str
    size: str = "3m"
    variant: str = "hybrid"
    vocab_size: int | None = None
    tokenizer: str = "bytes"
    corpus: tuple[str, ...] = ()
    validation_share: float = 0.05
    steps: int = 300
    batch_tokens: int = 2048
    pack_len: int = 2048
    seq_len: int = 512
    learning_rate: float = LEARNING_RATES[size]
    warmup_steps: int = 20
    decay_share: float = 0.2
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    linear_ramp: tuple[float, float, float] | None = None
    dtype: str = "float32"
    device: str = "cpu"
    dp: int | None = None
    cp: int = 1
    tp: int = 1
    ep: int = 1
    etp: int = 1
    num_groups: int = 2
    zigzag: bool = False
    lightning_backend: str | None = None
    softmax_backend: str | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    seed: int = 0
    log_every: int = 1
    validate_every: int = 100
    validation_tokens: int = 32768
    checkpoint_every: int = 100
    keep_checkpoints: int = 2

    @classmethod
    def for_device(cls, device: str, **given: Any) -> "TrainConfig":
        """Settings with the device's and the size's own defaults for all that is not given."""
        defaults: dict[str, Any] = dict(ON_A_GPU) if device.startswith("cuda") else {}
        size = given.get("size", cls.size)
        if size in LEARNING_RATES:
            defaults["learning_rate"] = LEARNING_RATES[size]
        return cls(device=device, **{**defaults, **given})

    def __post_init__(self) -> None:
        """Raise `ValueError` for settings that can't be meant."""
        for name, choices in (("size", SIZES), ("variant", VARIANTS), ("dtype", DTYPES)):
            value = getattr(self, name)
            expect(value in choices, f"{name} among {', '.join(choices)}", value)
        for name in ("steps", "pack_len", "seq_len", "keep_checkpoints"):
            expect(getattr(self, name) >= 1, f"{name} of at least 1", getattr(self, name))
        for name in ("log_every", "validate_every", "validation_tokens", "checkpoint_every"):
            expect(getattr(self, name) >= 1, f"{name} of at least 1", getattr(self, name))
        for name in (*MESH, "num_groups"):
            value = getattr(self, name)
            expect(value is None or value >= 1, f"{name} of at least 1", value)
        for name in ("validation_share", "decay_share"):
            value = getattr(self, name)
            expect(0 <= value < 1, f"{name} of at least 0 and below 1", value)
        for name in ("learning_rate", "clip_norm"):
            expect(getattr(self, name) > 0, f"{name} above 0", getattr(self, name))
        whole = self.batch_tokens >= 1 and self.batch_tokens % self.pack_len == 0
        expect(whole, f"batch_tokens that are packs of {self.pack_len}", self.batch_tokens)
        ramp = self.linear_ramp
        rises = ramp is None or (len(ramp) == 3 and 0 <= ramp[1] <= ramp[2] <= 1)
        expect(rises, "linear_ramp (value, begin, end) with 0 <= begin <= end <= 1", ramp)
        there = self.device == "cpu" or torch.cuda.is_available()
        expect(there, "a device that this machine has", self.device)


def lab_model(config: TrainConfig, tokenizer: Tokenizer) -> HybridConfig:
    """The model of `config.size` and `config.variant`, with the tokenizer's special tokens."""
    base = SIZES[config.size]
    variants = {"hybrid": base.hybrid, "softmax": base.all_softmax, "lightning": base.all_lightning}
    vocab_size = config.vocab_size or base.vocab_size
    check_vocabulary(tokenizer, vocab_size)
    return replace(
        variants[config.variant](),
        vocab_size=vocab_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise `ValueError` unless a model's vocabulary covers the tokenizer's."""
    expected = f"a tokenizer with at most the {vocab_size} ids of the model's vocabulary"
    got = f"{tokenizer.vocab_size} in {tokenizer.name} (vocab_size makes the model's larger)"
    expect(tokenizer.vocab_size <= vocab_size, expected, got)
