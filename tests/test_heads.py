"""Heads out of an interleaved projection: against their definition, as a custom op, on a GPU.

The kernels run on a GPU or under Triton's interpreter, which `tests/test_triton.py` starts.
"""

import pytest
import torch
import torch.nn.functional as F

from attnlab.model import heads as heads_module
from attnlab.model.heads import silu_heads
from tests.kernel_cases import as_exact, random, runs_kernels


def definition(x, head_dim):
    """Query, key and value `[B, H, T, K]`, column by column."""
    start = torch.arange(0, x.shape[2], 3 * head_dim, device=x.device)[:, None]  # of each head
    column = start + torch.arange(head_dim, device=x.device)  # [H, K]
    return [F.silu(x[:, :, column + j * head_dim]).transpose(1, 2) for j in range(3)]


def results(function, x, head_dim, grads):
    leaf = x.detach().requires_grad_()
    outputs = function(leaf, head_dim)
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaf, grads)]


def gradients(batch, heads, num_tokens, head_dim, dtype, device, heads_first):
    """Of query, key and value, as a scan leaves them or as views of tokens before heads."""
    shape = (batch, heads, num_tokens, head_dim)
    if not heads_first:
        shape = (batch, num_tokens, heads, head_dim)
    grads = [random(*shape, dtype=dtype, device=device, seed=s) for s in range(1, 4)]
    return grads if heads_first else [grad.transpose(1, 2) for grad in grads]


@runs_kernels
@pytest.mark.parametrize("heads_first", [False, True], ids=["tokens", "heads"])
@pytest.mark.parametrize(
    "shape", [(2, 3, 70, 32), (1, 1, 1, 8), (2, 2, 9, 30), (1, 2, 5, 256)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_triton_heads_and_their_gradients_are_rounded_once(dtype, shape, heads_first, device):
    batch, heads, num_tokens, head_dim = shape
    x = random(batch, num_tokens, heads * 3 * head_dim, dtype=dtype, device=device)
    grads = gradients(*shape, dtype, device, heads_first)
    actual = results(heads_module._silu_heads, x, head_dim, grads)
    expected = results(definition, x.double(), head_dim, [grad.double() for grad in grads])
    for a, e in zip(actual, expected, strict=True):
        as_exact(a, e, dtype, 1)
    assert all(y.stride(2) >= y.stride(1) for y in actual[:3])


@runs_kernels
def test_triton_heads_of_nothing_are_empty(device):
    x = random(2, 0, 96, dtype=torch.float32, device=device)
    grads = gradients(2, 1, 0, 32, torch.float32, device, True)
    *outputs, grad_x = results(heads_module._silu_heads, x, 32, grads)
    assert [y.shape for y in outputs] == [(2, 1, 0, 32)] * 3 and grad_x.shape == x.shape


@runs_kernels
def test_triton_heads_are_sound_custom_ops(device):
    x = random(2, 5, 48, dtype=torch.float32, device=device).requires_grad_()
    torch.library.opcheck(torch.ops.attnlab.silu_heads.default, (x, 8))


def test_heads_are_those_of_the_definition_where_no_kernel_runs():
    x, grads = random(2, 7, 3 * 2 * 4), gradients(2, 2, 7, 4, torch.float64, "cpu", True)
    for a, e in zip(*(results(f, x, 4, grads) for f in (silu_heads, definition)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-13, atol=1e-13)


@pytest.mark.gpu
def test_heads_on_a_gpu_are_the_kernels_and_right():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    shape = (3, 4, 500, 32)
    x = random(3, 500, 4 * 96, dtype=torch.bfloat16, device="cuda")
    grads = gradients(*shape, torch.bfloat16, "cuda", True)
    actual = results(silu_heads, x, 32, grads)
    assert actual[0].transpose(1, 2).is_contiguous()
    expected = results(definition, x.double(), 32, [grad.double() for grad in grads])
    for a, e in zip(actual, expected, strict=True):
        as_exact(a, e, torch.bfloat16, 1)
