"""Sharded checkpoints: each rank writes its part, and any number of ranks can read the whole.

Legend: E experts, F expert width, D hidden size.

A checkpoint is a folder of torch.distributed.checkpoint, named by its step, in which parameters and
AdamW's moments stand by name and place in the whole tensor. Experts are written as `[E, 2, F, D]`
and `[E, D, F]`, of which ep and etp cut plain slices, so that other numbers of ranks cut others. A
folder gets its name when all ranks have written, so that one that was interrupted is never read.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from attnlab.checks import expect
from attnlab.distributed.mesh import Meshes
from attnlab.distributed.parallel import ParallelLM, gather_state
from attnlab.model.hybrid import HybridLM

_MOMENTS = ("exp_avg", "exp_avg_sq")


def save_sharded(
    model: ParallelLM, optimizer: torch.optim.Optimizer, folder: Path, step: int, *, keep: int = 2
) -> None:
    """Write the state behind `step` steps, then remove all but the last `keep` checkpoints.

    Every rank has to call it; the folder has to be one that all ranks see.

    Raises:
        OSError: on all ranks, if one can't write its part; the checkpoints before stay.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f"{final.name}.partial"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    try:
        dcp.save(_whole_state(model, optimizer), checkpoint_id=partial)
    except dcp.api.CheckpointException as error:
        raise OSError(
            f"could not write {partial}, the checkpoint before is whole: {error}"
        ) from None
    if dist.get_rank() == 0:
        text = json.dumps({"step": step, "model": model.lm.config.to_dict()})
        (partial / "run.json").write_text(text)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in list_sharded(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def list_sharded(folder: Path) -> list[Path]:
    """Checkpoints that are complete, the oldest first."""
    return [path for path in sorted(folder.glob("step-*")) if path.suffix != ".partial"]


def load_sharded(model: ParallelLM, optimizer: torch.optim.Optimizer, folder: Path) -> int:
    """Take back the latest state, written by any number of ranks; returns its step, 0 for none.

    Raises:
        ValueError: on all ranks, for a checkpoint of another model or one that can't be read.
    """
    paths = list_sharded(folder)
    if not paths:
        return 0
    record = json.loads((paths[-1] / "run.json").read_text())
    found, wanted = record["model"], json.loads(json.dumps(model.lm.config.to_dict()))
    differing = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
    expect(not differing, f"a checkpoint of this model in {paths[-1]}", f"other {differing[:4]}")
    for parameter in _parameters(model).values():
        _make_state(optimizer, parameter, record["step"])
    state = _whole_state(model, optimizer)
    try:
        dcp.load(state, checkpoint_id=paths[-1])
    except dcp.api.CheckpointException as error:
        raise ValueError(f"expected a whole checkpoint in {paths[-1]}, got {error}") from None
    _put_back(model, optimizer, state)
    return record["step"]


def export_model(
    model: ParallelLM,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    layout: str = "transformers",
) -> None:
    """Write the model as one process reads it, config and safetensors; every rank has to call it.

    Without `dtype` weights keep that of the masters.
    """
    state = gather_state(model)
    if dist.get_rank() == 0:
        dtype = dtype or next(iter(state.values())).dtype
        state = {name: x.to(dtype) for name, x in state.items()}
        whole = HybridLM(model.lm.config, device="meta", dtype=dtype)
        whole.load_state_dict(
            state, strict=False, assign=True
        )  # a tied head has no name of its own
        whole.save_pretrained(folder, layout=layout)
    dist.barrier()


def _parameters(model: ParallelLM) -> dict[str, nn.Parameter]:
    return dict(model.lm.named_parameters())


def _make_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, step: int) -> None:
    """AdamW's state of a parameter, which AdamW itself makes at its first step only."""
    state = optimizer.state[parameter]
    state["step"] = torch.tensor(float(step))
    for name in _MOMENTS:
        state[name] = torch.zeros_like(parameter)


def _entries(
    model: ParallelLM, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, str, Tensor]]:
    """Name in the checkpoint, the parameter's name, and this rank's part of each tensor."""
    for name, parameter in _parameters(model).items():
        yield name, name, parameter.detach()
        for moment in _MOMENTS:
            yield f"{moment}.{name}", name, optimizer.state[parameter][moment]


def _whole_state(model: ParallelLM, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Every tensor as a part of a whole whose shape no layout changes."""
    meshes = model.context.meshes
    return {
        key: _as_slices(x, name, meshes) if ".experts." in name else x
        for key, name, x in _entries(model, optimizer)
    }


@torch.no_grad()
def _put_back(model: ParallelLM, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Experts were read into copies of another shape."""
    for key, name, own in _entries(model, optimizer):
        if ".experts." in name:
            assert isinstance(own, DTensor)
            part = state[key].to_local()
            part = part.flatten(1, 2) if name.endswith("gate_up_proj") else part
            own.copy_(distribute_tensor(part, own.device_mesh, own.placements))


def _as_slices(x: Tensor, name: str, meshes: Meshes) -> DTensor:
    """A rank's experts as a slice of `[E, 2, F, D]` or `[E, D, F]`, the same on the ranks of edp."""
    part = x.full_tensor() if isinstance(x, DTensor) else x
    if name.endswith("gate_up_proj"):
        part = part.unflatten(1, (2, -1))
    mesh = meshes.sparse["edp", "ep", "etp"]
    placements = [Replicate(), Shard(0), Shard(2)]
    return DTensor.from_local(part.contiguous(), mesh, placements, run_check=False)
