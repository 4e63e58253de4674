"""The hybrid model on many ranks: tokens over dp, cp and tp, experts over ep and etp, with FSDP2.

Legend: L tokens of a cp rank, l of this rank, D hidden size, V vocabulary.

Every rank has tokens of its own, its part of the pack that its cp and tp groups share. The mixers
exchange states and keys over cp and share heads over tp (`mixers`), the experts rows over ep and etp. Dense parameters are the same everywhere
and sharded over all ranks, experts over edp, the ranks that hold the same ones. Gradients are summed,
never averaged: the loss of a rank is its sum of token losses divided by the number of targets of
the whole step, so that experts' gradients, which meet the tokens of all ranks already, are right too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from attnlab.checks import expect
from attnlab.distributed.mesh import Meshes
from attnlab.distributed.mixers import Context, replace_module
from attnlab.distributed.moe import ExpertShard, mix_experts, shard_experts
from attnlab.distributed.pack import PackPlan
from attnlab.distributed.routing import Routing, route
from attnlab.model.decoder import DecoderLayer
from attnlab.model.hybrid import HybridLM
from attnlab.model.moe import Experts, MixtureOfExperts, RouterLoad, balancing_loss
from attnlab.model.placement import Placement


class ContextExperts(nn.Module):
    """This rank's part of a layer's experts."""

    def __init__(self, experts: Experts, context: Context) -> None:
        """Take the part of whole experts that ep and etp give this rank."""
        super().__init__()
        self.context = context
        groups = context.group("ep"), context.group("etp")
        with torch.no_grad():
            shard = shard_experts(experts.gate_up_proj, experts.down_proj, *groups)
        self.gate_up_proj = nn.Parameter(shard.gate_up.clone())
        self.down_proj = nn.Parameter(shard.down.clone())

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """`[L, D]`: each token's experts, weighted."""
        return mix_experts(
            x,
            routing,
            ExpertShard(self.gate_up_proj, self.down_proj),
            self.context.group("ep"),
            self.context.group("etp"),
            num_groups=self.context.num_groups,
        )


class ContextMixture(nn.Module):
    """Router and experts; the ranks that share a pack decide together what is dropped."""

    def __init__(self, mixture: MixtureOfExperts, context: Context) -> None:
        """Take over a mixture's router, and this rank's part of its experts."""
        super().__init__()
        self.context, self.gate = context, mixture.gate
        self.num_chosen, self.capacity_factor = mixture.num_chosen, mixture.capacity_factor
        self.experts = ContextExperts(mixture.experts, context)

    def forward(self, hidden: Tensor) -> tuple[Tensor, RouterLoad | None]:
        """`[1, L, D]` and, in training, how the router spread the pack's tokens."""
        x = hidden[0]
        factor = self.capacity_factor if self.training else None
        group = self.context.group("pack")
        runs = None if factor is None else self.context.runs()  # a matter of drops alone
        routing, load = route(
            x, self.gate.weight, self.num_chosen, group, capacity_factor=factor, runs=runs
        )
        return self.experts(x, routing)[None], load if self.training else None


class ParallelLM(nn.Module):
    """A hybrid model of which this rank computes its tokens' part; parameters keep their names."""

    def __init__(self, lm: HybridLM, context: Context) -> None:
        """Take over a model that is the same on all ranks, parts of it replaced."""
        super().__init__()
        config = lm.config
        context.meshes.layout.check_model(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            num_experts=config.num_local_experts,
            width=config.intermediate_size,
        )
        self.lm, self.context = lm, context
        for module in list(lm.modules()):
            replace_module(module, context)
            if isinstance(module, DecoderLayer):
                module.register_module("mlp", ContextMixture(module.mlp, context))

    def forward(self, input_ids: Tensor, plan: PackPlan) -> tuple[Tensor, list[RouterLoad]]:
        """Logits `[1, l, V]` of this rank's part of ids `[1, L]`, and in training the router loads.

        The loads are those of the whole pack.

        Raises:
            ValueError: for another number of ids than the plan gives the cp rank.
        """
        rank = self.context.group("cp").rank
        expected = [1, plan.local_len(rank)]
        expect(list(input_ids.shape) == expected, f"ids {expected}", list(input_ids.shape))
        self.context.work_on(plan)
        positions = plan.document_positions(rank)[None].to(input_ids.device)
        place = Placement(positions=positions, cu_seqlens=plan.local_cu_seqlens(rank))
        x, loads = self.lm.model(self.context.own_tokens(input_ids, 1), place, None)
        return self.lm.lm_head(self.lm.model.norm(x)), loads

    def backward(
        self, input_ids: Tensor, targets: Tensor, plan: PackPlan, *, num_targets: int, share: float
    ) -> Tensor:
        """Add this rank's part of the gradients of a step's loss; returns its sum of token losses.

        Args:
            input_ids: `[1, L]`, of this cp rank, as `plan.shard` gives them.
            targets: `[L]`, -100 where none counts; shifted before the pack was spread.
            plan: the pack that the cp group shares.
            num_targets: of the whole step, on all ranks.
            share: the pack's of them, with which its balancing loss weighs.
        """
        logits, loads = self(input_ids, plan)
        own = self.context.own_tokens(targets, 0)
        wide = torch.promote_types(logits.dtype, torch.float32)
        total = F.cross_entropy(logits[0].to(wide), own, ignore_index=-100, reduction="sum")
        loss = total / num_targets
        if loads:
            config = self.lm.config
            balance = balancing_loss(loads, config.router_aux_loss)
            coefficient = config.router_aux_loss_coef * share / self.context.group("pack").size
            loss = loss + coefficient * balance
        loss.backward()
        return total.detach()


def shard_parameters(model: ParallelLM, dtype: torch.dtype | None = None) -> ParallelLM:
    """Let FSDP2 shard a model's parameters: experts over edp, all others over all ranks.

    The shards stay as they are, masters so to speak; layers compute with copies in `dtype`, and
    gradients are summed in float32.
    """
    meshes = model.context.meshes
    # Inputs aren't cast: rotary angles and routers' weights are float32 for a reason.
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if dtype is not None:
        policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    world, same_experts = meshes.world, meshes.sparse["edp"]
    modules = list(model.modules())
    for kind, mesh in ((ContextExperts, same_experts), (DecoderLayer, world)):
        for module in modules:
            if isinstance(module, kind):
                fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=world, mp_policy=policy)
    for module in modules:
        if isinstance(module, FSDPModule):
            # Plain sums: gloo has no scaled ones.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    return model


def gradient_norm(model: ParallelLM) -> Tensor:
    """Norm of all gradients, a scalar that is the same on all ranks: every shard counts once."""
    squares = []
    for parameter in model.parameters():
        if parameter.grad is not None:
            squares.append(_local(parameter.grad).square().sum())
    total = model.context.group("world").all_reduce(torch.stack(squares).sum())
    return total.wait().sqrt()


def gather_state(model: ParallelLM) -> dict[str, Tensor]:
    """All parameters whole, by the names that the single-process model has, on every rank."""
    found = {}
    for name, parameter in model.lm.named_parameters():
        whole = parameter.detach()
        whole = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
        if ".experts." in name:
            whole = _whole_experts(whole, name.endswith("gate_up_proj"), model.context.meshes)
        found[name] = whole
    return found


def _whole_experts(part: Tensor, is_gate_up: bool, meshes: Meshes) -> Tensor:
    """The inverse of `shard_experts` for one of the two weights."""
    over_etp = meshes.group("etp").all_gather(part).wait()  # [etp, E/ep, ...]
    if is_gate_up:
        halves = over_etp.unflatten(2, (2, -1))  # [etp, E/ep, 2, F/etp, D]
        joined = halves.permute(1, 2, 0, 3, 4).flatten(1, 3)
    else:
        joined = over_etp.permute(1, 2, 0, 3).flatten(2, 3)  # [E/ep, D, F]
    return meshes.group("ep").all_gather(joined).wait().flatten(0, 1)


def _local(x: Tensor) -> Tensor:
    return x.to_local() if hasattr(x, "to_local") else x
