"""What tests of the kernels around the mixers share: inputs, gradients, and one tolerance."""

import os

import pytest
import torch

CAN_RUN = os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available()
runs_kernels = pytest.mark.skipif(not CAN_RUN, reason="needs a GPU or TRITON_INTERPRET=1")


def random(*shape, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def differentiated(function, tensors, grad):
    """The result, and the gradients of those tensors that are not None."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    output = function(*leaves)
    given = [x for x in leaves if x is not None]
    return [output.detach(), *torch.autograd.grad(output, given, grad)]


def as_exact(actual, expected, dtype, num_terms):
    """Rounded once, behind float32 sums of `num_terms`, whose errors grow as the root of that."""
    assert actual.shape == expected.shape
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 0.0
    tolerance = rounding + 8 * num_terms**0.5 * torch.finfo(torch.float32).eps
    size = expected.abs() + (expected.abs().mean() if expected.numel() else 0.0)
    assert ((actual.double() - expected).abs() <= tolerance * size).all()
