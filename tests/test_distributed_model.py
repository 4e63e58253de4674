"""A hybrid model with experts, trained for a few steps on ranks, against one process."""

from dataclasses import replace

import pytest
import torch
from distributed_model_cases import (
    EPSILON,
    run_logits,
    run_messages,
    run_recomputed,
    run_resumed,
    run_training,
    run_wrong_resume,
)
from distributed_mutations import MODEL_MUTATIONS

from attnlab.distributed.checkpoint import list_sharded
from attnlab.distributed.pack import PackPlan
from attnlab.model.config import HybridConfig
from attnlab.model.hybrid import HybridLM

STEPS = 3
TOLERANCE = 1e-6  # float64, but for the routers' loads: one process has them in float32

MESHES = {
    2: [{"cp": 2}, {"dp": 2, "ep": 2}, {"tp": 2, "etp": 2}],
    4: [{"dp": 2, "cp": 2, "ep": 2, "etp": 2}, {"cp": 4}],
    8: [{"dp": 2, "cp": 4, "ep": 4, "etp": 2}, {"cp": 8, "ep": 8}, {"dp": 2, "cp": 2, "tp": 2}],
}


def small(**changes):
    kinds = "linear_attention", "full_attention"
    return HybridConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=(kinds[0], kinds[1], kinds[0], kinds[0]),
        num_local_experts=8,
        num_experts_per_tok=2,
        rotary_dim=4,
        router_aux_loss_coef=0.05,
        initializer_range=0.3,
        **changes,
    )


def packs():
    """Two packs: ids, targets of which some don't count, bounds with a long and tiny documents."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for cu in ((0, 3, 40), (0, 21, 22, 23, 40)):
        ids = torch.randint(48, (1, 40), generator=generator)
        targets = torch.randint(48, (40,), generator=generator)
        targets[torch.tensor(cu[1:]) - 1] = -100
        found.append((ids, targets, cu))
    return found


def alone(config, steps=STEPS):
    """The same steps in one process."""
    torch.manual_seed(0)
    model = HybridLM(config, dtype=torch.float64).train()
    model.use_backend(lightning="torch", softmax="reference")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=EPSILON)
    data = packs()
    counts = [int((targets >= 0).sum()) for _, targets, _ in data]
    log = []
    for _ in range(steps):
        total = 0.0
        for (ids, targets, cu), count in zip(data, counts, strict=True):
            output = model(ids, cu_seqlens=torch.tensor(cu))
            losses = torch.nn.functional.cross_entropy(output.logits[0], targets, reduction="sum")
            share = config.router_aux_loss_coef * count / sum(counts)
            (losses / sum(counts) + share * output.aux_loss).backward()
            total += losses.item()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        optimizer.step()
        optimizer.zero_grad()
        log.append((total / sum(counts), norm.item()))
    return log, dict(model.named_parameters())


def check(world, config, layout, **flags):
    log, parameters = alone(config)
    for found, state in world.call(run_training, config, layout, packs(), STEPS, **flags):
        for numbers, wanted in zip(found, log, strict=True):
            assert numbers == pytest.approx(wanted, rel=TOLERANCE)
        assert set(state) == set(parameters)
        for name, whole in parameters.items():
            torch.testing.assert_close(state[name], whole.detach(), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("layout", MESHES[4], ids=str)
def test_training_on_ranks_is_that_of_one_process(worlds, layout):
    check(worlds(4), small(), layout)


def test_options_of_the_model_work_on_ranks(worlds):
    config = small(conv_width=3, qk_norm=True, log_length_scale=True, capacity_factor=0.8)
    check(worlds(2), config, {"cp": 2, "ep": 2})
    check(worlds(2), config, {"tp": 2, "etp": 2})


@pytest.mark.parametrize("layout", [{"cp": 2}, {"cp": 2, "tp": 2, "ep": 4}], ids=str)
def test_zigzag_drops_the_slots_that_one_process_drops(worlds, layout):
    size = layout["cp"] * layout.get("tp", 1)
    check(worlds(size), small(capacity_factor=0.6), layout, sharding=PackPlan.zigzag)


@pytest.mark.distributed_full
@pytest.mark.parametrize("size, layout", [(n, x) for n, found in MESHES.items() for x in found])
def test_all_meshes_are_those_of_one_process(worlds, size, layout):
    check(worlds(size), small(), layout)


@pytest.mark.parametrize("mutation", MODEL_MUTATIONS)
def test_a_planted_defect_is_seen(worlds, mutation):
    config, layout = small(), {"cp": 2}
    found = worlds(2).call(run_training, config, layout, packs(), STEPS, mutation=mutation)
    log, _ = alone(config)
    assert found[0][0] != [pytest.approx(step, rel=1e-4) for step in log]


@pytest.mark.parametrize("sharding", [PackPlan.contiguous, PackPlan.zigzag])
@pytest.mark.parametrize("layout", [{"cp": 4}, {"cp": 2, "tp": 2, "ep": 2, "etp": 2}], ids=str)
def test_all_ranks_make_the_same_collectives_in_a_step(worlds, layout, sharding):
    config = small(conv_width=3)
    events = worlds(4).call(run_messages, config, layout, packs(), sharding)
    assert {e.op for e in events[0]} >= {"all_gather", "p2p", "all_to_all", "all_reduce"}
    for number, called in enumerate(zip(*events, strict=True)):
        assert len({(e.op, e.group, e.messages) for e in called}) == 1, (number, called)
        if called[0].group == "etp":  # ranks of an ep group have the same experts' rows
            pairs = zip(called[::2], called[1::2], strict=True)
            assert all(one == other for one, other in pairs), (number, called)
        elif called[0].op == "all_to_all":  # rows as the router and the documents have it
            assert sum(e.sent_bytes for e in called) == sum(e.received_bytes for e in called)
        else:
            assert len(set(called)) == 1, (number, called)


def test_tied_embeddings_stay_one(worlds):
    check(worlds(2), replace(small(), tie_word_embeddings=True), {"cp": 2})


def test_a_checkpoint_goes_on_at_another_number_of_ranks_and_is_read_by_one_process(
    worlds, tmp_path
):
    config, folder = small(), tmp_path / "checkpoints"
    log, parameters = alone(config, 3)
    first = worlds(4).call(
        run_resumed, config, {"dp": 2, "cp": 2, "ep": 2, "etp": 2}, packs(), 2, folder
    )
    assert first[0][0] == 0
    (folder / "step-00000009.partial").mkdir()  # what an interrupted save leaves
    layout = {"cp": 2, "ep": 2}
    then = worlds(2).call(run_resumed, config, layout, packs(), 1, folder, tmp_path / "model")
    for found in then:
        assert found[0] == 2
        assert found[1][0] == pytest.approx(log[2], rel=TOLERANCE)
    assert [path.name for path in list_sharded(folder)] == ["step-00000003"]
    model = HybridLM.from_pretrained(tmp_path / "model")
    for name, parameter in model.named_parameters():
        close = {"rtol": TOLERANCE, "atol": TOLERANCE}
        torch.testing.assert_close(parameter, parameters[name], **close)


def test_a_checkpoint_of_another_model_is_refused_on_every_rank(worlds, tmp_path):
    worlds(2).call(run_resumed, small(), {"cp": 2}, packs(), 1, tmp_path)
    other = replace(small(), rope_theta=1e4)
    errors = worlds(2).call(run_wrong_resume, other, {"cp": 2}, tmp_path)
    assert errors[0] == errors[1]
    assert "expected a checkpoint of this model" in errors[0] and "rope_theta" in errors[0]


def test_a_damaged_checkpoint_is_refused_on_every_rank(worlds, tmp_path):
    worlds(2).call(run_resumed, small(), {"cp": 2}, packs(), 1, tmp_path)
    (tmp_path / "step-00000001" / "__1_0.distcp").unlink()
    for error in worlds(2).call(run_wrong_resume, small(), {"cp": 2}, tmp_path):
        assert "expected a whole checkpoint in" in error


def test_logits_in_evaluation_are_those_of_one_process(worlds):
    ids, _, cu = packs()[1]
    torch.manual_seed(0)
    model = HybridLM(small(), dtype=torch.float64).eval()
    with torch.no_grad():
        whole = model(ids, cu_seqlens=torch.tensor(cu)).logits
    parts = worlds(2).call(run_logits, small(), {"cp": 2, "ep": 2}, ids, cu)
    joined = PackPlan.zigzag(cu, 2).join(parts, 1)
    torch.testing.assert_close(joined, whole, rtol=0, atol=1e-12)


def test_layers_can_be_computed_again_in_the_backward(worlds):
    for kept, again in worlds(2).call(run_recomputed, small(), {"cp": 2, "ep": 2}, packs()):
        assert again == pytest.approx(kept, rel=1e-12)
