"""The short convolution's kernels against a loop over taps, as custom ops, and in the module.

The kernels run on a GPU or under Triton's interpreter, which `tests/test_triton.py` starts.
"""

import pytest
import torch

from attnlab.cache import StateCache
from attnlab.model import convolution as module
from attnlab.model.convolution import ShortConvolution
from attnlab.model.placement import Placement
from tests.kernel_cases import as_exact, differentiated, random, runs_kernels

DOCUMENTS = [0, 0, 1, 1, 1, 1, 1, 3, 4, 4, 4]  # numbers of tokens' sequences, among them empty ones


def by_taps(x, weight, sequence=None, before=None):
    """`[B, T, D]` in the dtype of x, tap after tap."""
    batch, num_tokens, _ = x.shape
    gap = weight.shape[1] - 1
    joined = torch.cat([x.new_zeros(batch, gap, x.shape[2]) if before is None else before, x], 1)
    output = torch.zeros_like(x)
    for w in range(gap + 1):
        shifted = joined[:, gap - w : gap - w + num_tokens]
        if sequence is not None:
            earlier = torch.cat([sequence.new_full((w,), -1), sequence])[:num_tokens]
            shifted = shifted * (earlier == sequence)[None, :, None]
        output = output + shifted * weight[:, gap - w]
    return output


@runs_kernels
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("width", [1, 3, 4])
@pytest.mark.parametrize(
    ("batch", "num_tokens", "channels"), [(2, 2, 8), (3, 75, 30), (2, 21, 200)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_triton_convolutions_and_their_gradients_are_rounded_once(
    dtype, batch, num_tokens, channels, width, packed, device, monkeypatch
):
    from kernels_triton import convolution

    monkeypatch.setattr(convolution, "_PROGRAMS", 2)  # so that a program has several tiles
    if packed:
        num_tokens, batch = batch * num_tokens, 1
    sequence = torch.tensor(DOCUMENTS * num_tokens)[:num_tokens].sort().values.to(device)
    sequence = sequence if packed else None
    x, grad = (random(batch, num_tokens, channels, dtype=dtype, seed=s) for s in range(2))
    weight = random(channels, width, dtype=dtype, seed=2)
    x, grad, weight = (t.to(device) for t in (x, grad, weight))
    actual = differentiated(
        lambda x, w: module._convolution(x, w, sequence, None), (x, weight), grad
    )
    expected = differentiated(
        lambda x, w: by_taps(x, w, sequence), (x.double(), weight.double()), grad.double()
    )
    for a, e, terms in zip(actual, expected, (width, width, batch * num_tokens), strict=True):
        as_exact(a, e, dtype, terms)


@runs_kernels
@pytest.mark.parametrize("num_tokens", [1, 2, 9])
def test_triton_convolutions_go_on_from_earlier_inputs(num_tokens, device):
    x, before = (random(3, n, 40, dtype=torch.float32, seed=n) for n in (num_tokens, 3))
    weight = random(40, 4, dtype=torch.float32, seed=2)
    actual = module._convolution(x.to(device), weight.to(device), None, before.to(device))
    expected = by_taps(x.double(), weight.double(), None, before.double())
    as_exact(actual.cpu(), expected, torch.float32, 4)


@runs_kernels
def test_a_triton_convolution_of_nothing_is_empty(device):
    x = random(2, 0, 8, dtype=torch.float32, device=device)
    weight = random(8, 4, dtype=torch.float32, device=device)
    output, grad_x, grad_weight = differentiated(
        lambda x, w: module._convolution(x, w, None, None), (x, weight), x
    )
    assert output.shape == grad_x.shape == x.shape
    assert torch.equal(grad_weight, torch.zeros_like(weight))


@runs_kernels
def test_triton_convolutions_are_sound_custom_ops(device):
    x = random(1, 11, 8, dtype=torch.float32, device=device).requires_grad_()
    weight = random(8, 4, dtype=torch.float32, device=device).requires_grad_()
    sequence = torch.tensor(DOCUMENTS, device=device)
    op = torch.ops.attnlab.short_convolution.default
    torch.library.opcheck(op, (x, weight, sequence, None))
    with torch.no_grad():
        torch.library.opcheck(op, (x.detach(), weight.detach(), None, x[:, :3].detach()))


@runs_kernels
def test_the_module_of_triton_kernels_is_that_of_torch(device, monkeypatch):
    """Call after call with a cache, of more and of fewer tokens than taps."""
    layer = ShortConvolution(40, 4, dtype=torch.float32, device=device)
    layer.weight.data = random(40, 4, dtype=torch.float32, device=device)
    place = Placement(positions=torch.zeros(1, 1, device=device))
    results = []
    for fused in (False, True):
        monkeypatch.setattr(module, "has_kernels_with", lambda *tensors, fused=fused: fused)
        cache = StateCache(None, torch.zeros(2, 3, 40, device=device))
        x = random(2, 20, 40, dtype=torch.float32, device=device, seed=1).split([1, 1, 7, 2, 9], 1)
        with torch.no_grad():
            results.append([torch.cat([layer(part, place, cache) for part in x], 1)])
            results[-1].append(cache.conv_inputs)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_the_module_on_a_gpu_is_as_exact_as_torchs(packed, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    layer = ShortConvolution(128, 4, dtype=torch.bfloat16, device="cuda")
    layer.weight.data = random(128, 4, dtype=torch.bfloat16, device="cuda")
    sequence = torch.tensor(DOCUMENTS, device="cuda").repeat_interleave(30)
    bounds = torch.searchsorted(sequence, torch.arange(6, device="cuda"))
    x = random(1, 330, 128, dtype=torch.bfloat16, device="cuda", seed=1)
    place = Placement(
        positions=torch.zeros(1, 330, device="cuda"),
        cu_seqlens=bounds if packed else None,
        sequence=sequence[None] if packed else None,
    )
    actual = differentiated(lambda x: layer(x, place, None), (x,), x)
    sequence = sequence if packed else None
    expected = differentiated(
        lambda x: by_taps(x, layer.weight.double(), sequence), (x.double(),), x.double()
    )
    for a, e in zip(actual, expected, strict=True):
        as_exact(a, e, torch.bfloat16, 4)
