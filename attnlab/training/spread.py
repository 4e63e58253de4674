"""Where a run trains: in this process alone, or on the ranks that torchrun started.

Either trainer has the same methods, which `attnlab.training.train` calls alike on every rank; what
differs between ranks is which of them leads, that is logs, shows progress and writes what is not
sharded.
"""

from typing import TYPE_CHECKING

from attnlab.checks import expect
from attnlab.distributed.launch import Job
from attnlab.distributed.mesh import Meshes
from attnlab.model.hybrid import HybridLM
from attnlab.training.config import DTYPES, MESH, TrainConfig
from attnlab.training.trainer import Trainer

if TYPE_CHECKING:
    from attnlab.training.ranks import RankTrainer


def check_ranks(config: TrainConfig, job: Job | None, *, validation_len: int) -> None:
    """Raise `ValueError` for settings that don't go with one process, or with the ranks of a job.

    `validation_len`: tokens of a validation's pack.
    """
    if job is None:
        given = {name: getattr(config, name) for name in MESH}
        spread = {name: n for name, n in given.items() if n not in (None, 1)}
        expect(not spread, "torchrun, which starts the ranks of a mesh, or no mesh", spread)
        return
    words = f'device "{job.device_type}", of which each rank takes its own'
    expect(config.device == job.device_type, words, config.device)
    expect(not config.compile, "no compile on ranks", "it")
    expect(config.softmax_backend is None, "no softmax_backend on ranks", config.softmax_backend)
    chunks = config.cp * (2 if config.zigzag else 1)
    for name, length in (("pack_len", config.pack_len), ("a validation pack", validation_len)):
        # Fewer tokens than ranks would leave some without any, whose share of the loss is nothing.
        expect(length >= chunks, f"{name} of at least {chunks} tokens for cp {config.cp}", length)


def trainer_of(
    config: TrainConfig, model: HybridLM, meshes: Meshes | None
) -> "Trainer | RankTrainer":
    """The trainer of a new float32 model, which is the same on all ranks.

    Raises:
        ValueError: on all ranks, for a model or packs that the meshes don't divide.
    """
    dtype, rates = DTYPES[config.dtype], (config.weight_decay, config.clip_norm)
    if meshes is None:
        return Trainer(model, dtype=dtype, weight_decay=rates[0], clip_norm=rates[1])
    packs, dp = config.batch_tokens // config.pack_len, meshes.layout.dp
    words = f"batch_tokens of packs in a multiple of dp {dp}"
    expect(packs % dp == 0, words, f"{packs} of {config.pack_len} tokens")
    from attnlab.training.ranks import RankTrainer  # FSDP takes a second to import

    return RankTrainer(
        model,
        meshes,
        dtype=dtype,
        weight_decay=rates[0],
        clip_norm=rates[1],
        num_groups=config.num_groups,
        zigzag=config.zigzag,
    )
