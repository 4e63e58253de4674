"""Routing, dropping, balancing losses and grouped products, against loops that say what is meant."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from attnlab.model import HybridConfig
from attnlab.model import moe as moe_module
from attnlab.model.grouped import grouped_linear
from attnlab.model.moe import MixtureOfExperts, RouterLoad, balancing_loss, sort_by_expert
from attnlab.model.slots import from_slots

FLOAT64 = 1e-12
"""Of the largest value: two products and a weighted sum of up to 100 terms in float64 (1e-16)."""


pytestmark = pytest.mark.usefixtures("one_thread")


def make_moe(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_local_experts": 5}
    config = replace(HybridConfig.tiny(), **(sizes | changes))
    layer = MixtureOfExperts(config, dtype=dtype)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, 0.0, 0.3)
    return layer


def make_hidden(*shape, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, 24, generator=generator, dtype=torch.float64).to(dtype)


def deviation(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def expert_output(layer, e, x):
    w1, w3 = layer.experts.gate_up_proj[e].chunk(2)
    return layer.experts.down_proj[e] @ (F.silu(w1 @ x) * (w3 @ x))


def by_loop(layer, hidden, capacity=None):
    """Token after token: the best two experts, unless an expert has had its fill of tokens."""
    used, rows = [0] * 5, []
    for x in hidden.flatten(0, -2):
        probabilities = (layer.gate.weight @ x).softmax(0)
        best = sorted(range(5), key=lambda e: -probabilities[e].item())[: layer.num_chosen]
        total = sum(probabilities[e] for e in best)
        row = torch.zeros_like(x)
        for e in best:
            if capacity is None or used[e] < capacity:
                row = row + probabilities[e] / total * expert_output(layer, e, x)
            used[e] += 1
        rows.append(row)
    return torch.stack(rows).view(hidden.shape)


@pytest.mark.parametrize("num_chosen", [1, 2, 5])
def test_a_token_gets_the_weighted_sum_of_its_best_experts(num_chosen):
    layer = make_moe(num_experts_per_tok=num_chosen).eval()
    hidden = make_hidden(3, 11).requires_grad_()
    output, load = layer(hidden)
    expected = by_loop(layer, hidden)
    assert load is None
    assert deviation(output, expected) < FLOAT64
    flowing, tensors = torch.randn_like(output), [hidden, *layer.parameters()]
    actual = torch.autograd.grad((output * flowing).sum(), tensors)
    grads = torch.autograd.grad((expected * flowing).sum(), tensors, materialize_grads=True)
    for a, b in zip(actual, grads, strict=True):
        # With one expert its weight is 1, and the router's gradient rounding alone.
        assert (a - b).abs().max() < 1e-10


def test_an_expert_that_is_alone_takes_every_token_with_weight_1():
    layer = make_moe(num_local_experts=1, num_experts_per_tok=1, capacity_factor=1.0)
    hidden, w = make_hidden(3, 11).requires_grad_(), layer.experts
    output, load = layer(hidden)
    expected = torch.stack([expert_output(layer, 0, x) for x in hidden.flatten(0, 1)])
    assert deviation(output, expected.view(3, 11, 24)) < FLOAT64
    assert load.fraction.tolist() == load.probability.tolist() == [1.0]
    assert balancing_loss([load], "transformers") == 1.0
    grads = []
    for y in (output, expected.view(3, 11, 24)):
        loss, leaves = y.square().sum(), (hidden, w.gate_up_proj, w.down_proj)
        grads.append(torch.autograd.grad(loss, leaves, retain_graph=True))
    assert all(deviation(a, b) < FLOAT64 for a, b in zip(*grads, strict=True))
    assert torch.equal(layer.eval()(hidden)[0], output) and layer(hidden)[1] is None
    output.sum().backward()
    assert layer.gate.weight.grad is None


def test_an_expert_that_is_alone_drops_what_is_above_its_fill():
    layer = make_moe(num_local_experts=1, num_experts_per_tok=1, capacity_factor=0.5).train()
    output = layer(make_hidden(2, 10))[0].flatten(0, 1)
    assert output[:10].abs().min() > 0 and torch.equal(output[10:], torch.zeros(10, 24).double())


@pytest.mark.parametrize("factor", [0.3, 0.8, 1.0, 1.5])
def test_experts_drop_the_tokens_that_come_after_their_fill(factor):
    layer = make_moe(capacity_factor=factor).train()
    hidden = make_hidden(2, 20) + 0.5  # a common direction favours some experts
    capacity = math.ceil(factor * 40 * 2 / 5)
    output, load = layer(hidden)
    assert deviation(output, by_loop(layer, hidden, capacity)) < FLOAT64
    counts = load.fraction * 40
    assert (counts > capacity).any(), "the case drops nothing"
    assert counts.sum() == 80  # the load is what was chosen, not what was kept
    assert deviation(layer.eval()(hidden)[0], by_loop(layer, hidden)) < FLOAT64


def test_all_devices_together_decide_what_is_dropped():
    """Three devices see each other's counts: together they keep what an expert may have, no more."""
    hidden = [make_hidden(1, 30, seed=s) + 0.2 for s in range(3)]
    layer = make_moe(capacity_factor=0.7).train()
    chosen = [layer.gate(x[0]).topk(2).indices for x in hidden]
    counts = torch.stack([torch.bincount(e.flatten(), minlength=5) for e in chosen])
    capacity = math.ceil(0.7 * 90 * 2 / 5)
    layer.global_counts = lambda local: counts.sum(0)
    kept = []
    for device, experts in enumerate(chosen):
        order, ends = sort_by_expert(experts, 5)
        mask = layer._kept(order, ends, counts[device].int(), 0.7)
        kept.append(torch.bincount(experts.flatten()[mask], minlength=5))
    kept = torch.stack(kept)
    total = counts.sum(0)
    assert (total > capacity).any() and (total < capacity).any()
    for e in range(5):
        if total[e] <= capacity:
            assert torch.equal(kept[:, e], counts[:, e])
        else:  # each device its share, rounded down
            assert torch.equal(kept[:, e], counts[:, e] * capacity // total[e])
            assert capacity - 3 < kept[:, e].sum() <= capacity


def test_balancing_losses_are_those_of_their_papers():
    layer = make_moe().train()
    loads, f, p = [], [], []
    for seed in range(3):
        x = make_hidden(40, seed=seed)
        loads.append(layer(x)[1])
        probabilities = (x @ layer.gate.weight.T).softmax(-1)
        chosen = probabilities.topk(2).indices
        f.append(torch.stack([(chosen == e).any(1).double().mean() for e in range(5)]))
        p.append(probabilities.mean(0))
    paper = sum((a * b).sum() / 5 for a, b in zip(f, p, strict=True)) / 3
    switch = 5 * (sum(f) / 3 * (sum(p) / 3)).sum()
    torch.testing.assert_close(balancing_loss(loads, "paper"), paper, rtol=1e-6, atol=0)
    torch.testing.assert_close(balancing_loss(loads, "transformers"), switch, rtol=1e-6, atol=0)


def test_an_even_load_costs_two_for_two_experts_a_token():
    even = RouterLoad(torch.full((8,), 2 / 8), torch.full((8,), 1 / 8))
    assert balancing_loss([even] * 4, "transformers").item() == pytest.approx(2.0)
    assert balancing_loss([even] * 4, "paper").item() == pytest.approx(2 / 64)
    uneven = RouterLoad(torch.tensor([1.0, 1.0] + [0.0] * 6), torch.tensor([0.5, 0.5] + [0.0] * 6))
    assert balancing_loss([uneven], "transformers").item() == pytest.approx(8.0)


def test_a_step_along_the_loss_evens_out_the_load():
    layer = make_moe(torch.float32).train()
    hidden = make_hidden(200, dtype=torch.float32) + 0.5  # a common direction favours some experts
    optimizer = torch.optim.SGD(layer.gate.parameters(), lr=0.5)
    losses = []
    for _ in range(60):
        loss = balancing_loss([layer(hidden)[1]], "transformers")
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 2.05 < losses[0]


def test_the_router_of_a_bf16_model_computes_in_float32():
    """Its logits are those of the rounded weights and states, to float32's own rounding."""
    layer = make_moe(torch.bfloat16)
    x = make_hidden(50, dtype=torch.bfloat16)
    logits, exact = layer.gate(x), x.double() @ layer.gate.weight.double().T
    assert logits.dtype == torch.float32
    assert deviation(logits, exact) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.gate(x), logits)


def test_a_bf16_sum_over_experts_is_rounded_once():
    """Five experts whose terms nearly cancel: summed in bf16 the error would be 30 times larger."""
    rows = make_hidden(64 * 5, dtype=torch.bfloat16)
    weights = torch.randn(64, 5, generator=torch.Generator().manual_seed(2)).bfloat16()
    own = rows.double().view(64, 5, 24)
    weights[:, 4] = 0
    own[:, 3] = -own[:, :3].sum(1)
    rows = own.bfloat16().flatten(0, 1)
    weights[:, :4] = 1.0
    expected = (weights.double()[..., None] * rows.double().view(64, 5, 24)).sum(1)
    slots = torch.arange(64 * 5).view(64, 5)
    actual = from_slots(rows, slots, weights).double()
    # One rounding of the result: 2^-9 of it, and float32's of the terms, which are below 16.
    assert ((actual - expected).abs() <= 2**-8 * expected.abs() + 16 * 2**-22).all()


def test_tokens_are_worked_off_in_parts_where_no_gradient_is_wanted(monkeypatch):
    layer, hidden = make_moe().eval(), make_hidden(2, 25)
    with torch.no_grad():
        whole, _ = layer(hidden)
        monkeypatch.setattr(moe_module, "_TOKENS_AT_ONCE", 7)
        sizes = []
        monkeypatch.setattr(
            layer, "_mix", lambda x: sizes.append(len(x)) or MixtureOfExperts._mix(layer, x)
        )
        parts, _ = layer(hidden)
    assert sizes == [7] * 7 + [1]
    assert deviation(parts, whole) < FLOAT64


def test_slots_are_sorted_by_expert_and_stay_in_the_order_of_the_tokens():
    experts = torch.tensor([[3, 0], [0, 3], [4, 0]])
    order, ends = sort_by_expert(experts, 6)
    assert order.tolist() == [1, 2, 5, 0, 3, 4]
    assert ends.tolist() == [3, 3, 3, 5, 6, 6]
    assert ends.dtype == torch.int32


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 9, 0], [0, 0, 0, 0]], ids=str)
def test_grouped_products_are_the_products_of_the_groups(counts, device):
    ends = torch.tensor(counts).cumsum(0)
    x = torch.randn(sum(counts), 16, dtype=torch.float64, device=device, requires_grad=True)
    weight = torch.randn(4, 24, 16, dtype=torch.float64, device=device, requires_grad=True)
    actual = grouped_linear(x, weight, ends.int().to(device))
    parts = zip(x.split(counts), weight, strict=True)
    expected = torch.cat([part @ w.T for part, w in parts])
    torch.testing.assert_close(actual, expected, rtol=FLOAT64, atol=FLOAT64)
    flowing = torch.randn_like(expected)
    grads = [torch.autograd.grad((y * flowing).sum(), (x, weight)) for y in (actual, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=FLOAT64, atol=FLOAT64)


def test_the_grouped_product_is_a_sound_custom_op():
    x = torch.randn(6, 8, requires_grad=True)
    weight = torch.randn(3, 5, 8, requires_grad=True)
    ends = torch.tensor([2, 2, 6], dtype=torch.int32)
    torch.library.opcheck(torch.ops.attnlab.grouped_linear.default, (x, weight, ends))


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [2, 48, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_grouped_products_on_a_gpu_are_as_exact_as_plain_ones(dtype, num_rows):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.randint(6, (num_rows,), generator=generator), minlength=8)
    ends = counts.cumsum(0).int().cuda()
    x = torch.randn(num_rows, 128, dtype=dtype, device="cuda", requires_grad=True)
    weight = torch.randn(8, 64, 128, dtype=dtype, device="cuda", requires_grad=True)
    parts = zip(x.double().split(counts.tolist()), weight.double(), strict=True)
    expected = torch.cat([part @ w.T for part, w in parts])
    actual = grouped_linear(x, weight, ends)
    flowing = torch.randn_like(actual)
    grads = torch.autograd.grad((actual * flowing).sum(), (x, weight))
    wanted = torch.autograd.grad((expected * flowing.double()).sum(), (x, weight))
    # Operands are exact; what is rounded is the result, and sums in float32, whose errors grow as
    # the root of their length (weights sum over rows).
    sums = torch.finfo(torch.float32).eps * num_rows**0.5 / 16
    for a, b in zip((actual, *grads), (expected, *wanted), strict=True):
        assert deviation(a.double(), b.double()) < 2 * torch.finfo(dtype).eps + sums
