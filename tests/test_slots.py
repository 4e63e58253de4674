"""Tokens to slots and back, and the experts' gate: gradients, soundness as ops, the GPU's kernels.

The kernels run on a GPU or under Triton's interpreter, which `tests/test_triton.py` starts.
"""

import os

import pytest
import torch
import torch.nn.functional as F

from attnlab.model import HybridConfig
from attnlab.model.moe import MixtureOfExperts
from attnlab.model.slots import from_slots, gated_silu, to_slots

CAN_RUN = os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available()
runs_kernels = pytest.mark.skipif(not CAN_RUN, reason="needs a GPU or TRITON_INTERPRET=1")
N, K, D = 5, 3, 8  # tokens, experts a token, channels


def random(*shape, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def permutation(num_tokens, device="cpu"):
    order = torch.randperm(num_tokens * K, generator=torch.Generator().manual_seed(1))
    return order.to(device), order.argsort().view(num_tokens, K).to(device)


def test_tokens_go_to_their_slots_and_come_back_weighted():
    order, slots = permutation(N)
    x, weights = random(N, D), random(N, K, seed=1)
    rows = to_slots(x, order, slots)
    for n in range(N):
        for j in range(K):
            assert torch.equal(rows[slots[n, j]], x[n])
    expected = weights.sum(1, keepdim=True) * x
    torch.testing.assert_close(from_slots(rows, slots, weights), expected, rtol=1e-13, atol=1e-13)


def test_gradients_are_those_of_finite_differences():
    order, slots = permutation(N)
    x = random(N, D).requires_grad_()
    rows = random(N * K, D, seed=1).requires_grad_()
    weights = random(N, K, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: to_slots(x, order, slots), (x,))
    assert torch.autograd.gradcheck(lambda r, w: from_slots(r, slots, w), (rows, weights))
    assert torch.autograd.gradcheck(gated_silu, (rows,))


def test_they_are_sound_custom_ops():
    order, slots = permutation(N)
    x, rows = (random(n, D, dtype=torch.float32).requires_grad_() for n in (N, N * K))
    weights = random(N, K, dtype=torch.float32).requires_grad_()
    ops = torch.ops.attnlab
    torch.library.opcheck(ops.to_slots.default, (x, order, slots))
    torch.library.opcheck(ops.from_slots.default, (rows, slots, weights))
    torch.library.opcheck(ops.gated_silu.default, (rows,))


def as_exact(actual, expected, dtype, terms=1):
    """Rounded once, after float32 arithmetic of a few operations (or a sum of `terms`)."""
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 0.0
    tolerance = rounding + 8 * terms**0.5 * torch.finfo(torch.float32).eps
    error = (actual.double() - expected).abs()
    assert (error <= tolerance * (expected.abs() + expected.abs().mean())).all(), error.max()


@runs_kernels
@pytest.mark.parametrize("width", [8, 30, 1024, 1100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_triton_kernels_are_rounded_once(dtype, width, device):
    from kernels_triton import experts

    x = random(N * K, 2 * width, dtype=dtype, device=device)
    exact = x.double().requires_grad_()
    gate, up = exact.chunk(2, -1)
    gated = F.silu(gate) * up
    grad = random(N * K, width, dtype=dtype, device=device, seed=3)
    as_exact(experts.gated_silu(x), gated, dtype)
    wanted = torch.autograd.grad(gated, exact, grad.double())[0]
    as_exact(experts.gated_silu_backward(grad, x), wanted, dtype)

    _, slots = permutation(N, device)
    rows, grad = x[:, :width].contiguous(), grad[:N].contiguous()
    weights = random(N, K, dtype=torch.float32, device=device, seed=4)
    exact = rows.double().requires_grad_(), weights.double().requires_grad_()
    own = exact[0][slots]
    as_exact(experts.weighted_sum(rows, slots, None), own.sum(1), dtype)
    summed = (own * exact[1][..., None]).sum(1)
    as_exact(experts.weighted_sum(rows, slots, weights), summed, dtype)
    wanted = torch.autograd.grad(summed, exact, grad.double())
    grad_rows, grad_weights = experts.weighted_sum_backward(grad, rows, slots, weights)
    as_exact(grad_rows, wanted[0], dtype)
    as_exact(grad_weights, wanted[1], torch.float32, terms=width)


# Rows of several blocks in the first product, then in the second: of both, where a GPU runs them.
SIZES = [(8, 8), (48, 30), (528, 16), (16, 528)]
SIZES += [(1040, 528)] if torch.cuda.is_available() else []


@runs_kernels
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_triton_experts_of_few_tokens_are_rounded_once(dtype, sizes, device):
    from kernels_triton import experts

    hidden, width = sizes
    x = random(N, hidden, dtype=dtype, device=device)
    chosen = torch.tensor([[0, 3], [3, 1], [2, 0], [1, 3], [0, 1]], device=device)
    weights = random(N, 2, dtype=torch.float32, device=device, seed=1)
    gate_up = random(4, 2 * width, hidden, dtype=dtype, device=device, seed=2) / hidden**0.5
    down = random(4, hidden, width, dtype=dtype, device=device, seed=3)
    actual = experts.few_experts(x, chosen, weights, gate_up, down)
    expected = []
    for n in range(N):
        rows = []
        for j, e in enumerate(chosen[n].tolist()):
            gate, up = (gate_up[e].double() @ x[n].double()).chunk(2)
            gated = (F.silu(gate) * up).to(dtype).double()  # it goes through memory
            rows.append(weights[n, j].double() * (down[e].double() @ gated))
        expected.append(sum(rows))
    as_exact(actual, torch.stack(expected), dtype, terms=width)


@pytest.mark.gpu
def test_ops_on_a_gpu_have_the_gradients_of_the_cpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    results = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        order, slots = permutation(300, device)
        x = random(300, 128, dtype=dtype, device=device).requires_grad_()
        weights = random(300, K, dtype=dtype, device=device, seed=1).requires_grad_()
        output = from_slots(gated_silu(to_slots(x, order, slots)).repeat(1, 2), slots, weights)
        grads = torch.autograd.grad((output * output.detach()).sum(), (x, weights))
        results.append([output, *grads])
    for exact, actual in zip(*results, strict=True):
        as_exact(actual.cpu(), exact, torch.float32, terms=128)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 16, 17])
def test_few_tokens_on_a_gpu_get_what_many_get(num_tokens):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)
    layer = MixtureOfExperts(HybridConfig.tiny(), device="cuda", dtype=torch.bfloat16).eval()
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, 0.0, weight.shape[-1] ** -0.5)
    hidden = torch.randn(1, 64, weight.shape[1], device="cuda").bfloat16()
    with torch.no_grad():
        alone = layer(hidden[:, :num_tokens])[0]
        together = layer(hidden)[0][:, :num_tokens]
    # Two roundings more: of each expert's row, and of what it is the product of.
    assert (alone - together).float().norm() < 2**-7 * together.float().norm()
