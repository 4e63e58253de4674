"""What each rank runs for the tests of the whole model."""

import torch
from distributed_mutations import mutated

from attnlab.distributed.checkpoint import export_model, load_sharded, save_sharded
from attnlab.distributed.comm import Ledger
from attnlab.distributed.mesh import Layout, Meshes
from attnlab.distributed.pack import PackPlan
from attnlab.distributed.parallel import (
    Context,
    ParallelLM,
    gather_state,
    gradient_norm,
    shard_parameters,
)
from attnlab.distributed.trainer import ParallelTrainer
from attnlab.model.hybrid import HybridLM


def run_training(
    rank, size, config, layout, packs, steps, mutation=None, sharding=PackPlan.contiguous
):
    """Losses and gradient norms of a few steps, and the parameters behind them, gathered."""
    with mutated(mutation):
        model, optimizer = start_training(size, config, layout)
        log = [train_step(model, optimizer, packs, sharding) for _ in range(steps)]
    return log, gather_state(model)


def start_training(size, config, layout, ledger=None):
    torch.manual_seed(0)
    lm = HybridLM(config, dtype=torch.float64)
    lm.use_backend(lightning="torch")
    meshes = Meshes(Layout(world_size=size, **layout), "cpu", ledger)
    model = shard_parameters(ParallelLM(lm.train(), Context(meshes)))
    return model, adamw(model)


def train_step(model, optimizer, packs, sharding=PackPlan.contiguous):
    """Loss and gradient norm of one step over all packs."""
    meshes = model.context.meshes
    dp, cp = meshes.group("dp"), meshes.group("cp")
    num_targets = sum(int((targets >= 0).sum()) for _, targets, _ in packs)
    total = torch.zeros((), dtype=torch.float64)
    for ids, targets, cu in packs[dp.rank :: dp.size]:
        plan = sharding(cu, cp.size)
        share = int((targets >= 0).sum()) / num_targets
        local = plan.shard(ids, cp.rank, 1), plan.shard(targets, cp.rank)
        total += model.backward(*local, plan, num_targets=num_targets, share=share)
    norm = gradient_norm(model)
    optimizer.step()
    optimizer.zero_grad()
    loss = meshes.group("world").all_reduce(total).wait() / num_targets
    return loss.item(), norm.item()


def run_resumed(rank, size, config, layout, packs, steps, folder, exported=None):
    """Go on from the checkpoint in a folder for some steps, and leave one; the first step, and a log."""
    model, optimizer = start_training(size, config, layout)
    start = load_sharded(model, optimizer, folder)
    log = [train_step(model, optimizer, packs) for _ in range(steps)]
    save_sharded(model, optimizer, folder, start + steps, keep=1)
    if exported is not None:
        export_model(model, exported)
    return start, log, gather_state(model)


def run_logits(rank, size, config, layout, ids, cu):
    """Logits of this rank in evaluation mode, without gradients."""
    model, _ = start_training(size, config, layout)
    plan = PackPlan.zigzag(cu, model.context.group("cp").size)
    model.eval()
    with torch.no_grad():
        return model(plan.shard(ids, model.context.group("cp").rank, 1), plan)[0]


def run_recomputed(rank, size, config, layout, packs):
    """A step's loss and gradient norm, layers kept and layers computed again."""
    found = []
    for again in (False, True):
        model, optimizer = start_training(size, config, layout)
        model.lm.gradient_checkpointing = again
        found.append(train_step(model, optimizer, packs))
    return found


def run_wrong_resume(rank, size, config, layout, folder):
    """The error of this rank."""
    model, optimizer = start_training(size, config, layout)
    try:
        load_sharded(model, optimizer, folder)
    except ValueError as error:
        return str(error)
    return None


def run_trainer(rank, size, config, layout, packs, dtype, zigzag):
    """Losses and norms of two steps in float32 masters, or the error of this rank.

    `packs` are all ranks', or a list of each rank's.
    """
    packs = packs[rank] if isinstance(packs[0], list) else packs
    torch.manual_seed(0)
    lm = HybridLM(config, dtype=torch.float32).use_backend(lightning="torch")
    meshes = Meshes(Layout(world_size=size, **layout), "cpu")
    trainer = ParallelTrainer(lm, meshes, dtype=dtype, zigzag=zigzag)
    try:
        return [[x.item() for x in trainer.step(packs, learning_rate=1e-3)] for _ in range(2)]
    except ValueError as error:
        return str(error)


def run_messages(rank, size, config, layout, packs, sharding):
    """What this rank sends and receives in one step, FSDP's messages apart."""
    ledger = Ledger()
    model, optimizer = start_training(size, config, layout, ledger)
    train_step(model, optimizer, packs, sharding)
    return ledger.events


def run_losses(rank, size, config, layout, packs_by_rank, zigzag=False):
    """Sums of this rank's token losses of each of its packs, one after the other, or the error."""
    meshes = Meshes(Layout(world_size=size, **layout), "cpu")
    torch.manual_seed(0)
    lm = HybridLM(config, dtype=torch.float32).use_backend(lightning="torch")
    own = zigzag[rank] if isinstance(zigzag, list) else zigzag
    trainer, found = ParallelTrainer(lm, meshes, zigzag=own), []
    trainer.model.eval()
    for pack in packs_by_rank[rank]:
        try:
            losses, _, _ = trainer.losses(pack)
            found.append(losses.sum().item())
        except ValueError as error:
            found.append(str(error))
    return found


EPSILON = 1e-3  # large: AdamW makes a full step of a gradient that is but a rounding


def adamw(model):
    """AdamW, experts in a group of their own: they lie on another mesh."""
    experts = [p for n, p in model.named_parameters() if ".experts." in n]
    others = [p for n, p in model.named_parameters() if ".experts." not in n]
    return torch.optim.AdamW([{"params": others}, {"params": experts}], lr=1e-2, eps=EPSILON)
