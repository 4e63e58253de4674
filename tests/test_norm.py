"""RMSNorm's kernels against float64, as custom ops, and in the place of torch's module.

The kernels run on a GPU or under Triton's interpreter, which `tests/test_triton.py` starts.
"""

import pytest
import torch
import torch.nn.functional as F

from attnlab.model import norm as norm_module
from attnlab.model.norm import RMSNorm
from tests.kernel_cases import as_exact, differentiated, random, runs_kernels

EPS = 1e-5
# The interpreter runs 16 columns of a weight's gradient at a time.
WIDEST = 6144 if torch.cuda.is_available() else 2064
FORMS = ["alone", "sum", "gate", "sum and gate", "scale", "scale by row"]


def arguments_of(form, shape, dtype, device):
    """Norm's positional tensors: x, plus, gate, scale, weight."""
    x, plus, gate = (random(*shape, dtype=dtype, device=device, seed=s) for s in range(3))
    weight = 1 + 0.3 * random(shape[-1], device=device, seed=3)
    wide = torch.promote_types(dtype, torch.float32)
    scale_shape = shape[:-1] if form == "scale by row" else (1, *shape[1:-1])
    optional = {"sum": plus, "gate": gate}
    optional["scale"] = random(*scale_shape, dtype=wide, device=device, seed=5)
    return x, *(y if name in form else None for name, y in optional.items()), weight.to(dtype)


def definition(x, plus, gate, scale, weight, alpha, beta):
    z = x if plus is None else alpha * x + beta * plus
    normed = weight * z / (z.square().mean(-1, keepdim=True) + EPS).sqrt()
    normed = normed if gate is None else normed * gate.sigmoid()
    return normed if scale is None else normed * scale[..., None]


@runs_kernels
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(3, 70, 32), (300, 30), (5, 1100), (2, WIDEST)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_triton_norms_and_their_gradients_are_rounded_once(dtype, shape, form, device, monkeypatch):
    from kernels_triton import norm

    monkeypatch.setattr(norm, "_PROGRAMS", 2)  # so that a program has several tiles
    tensors = arguments_of(form, shape, dtype, device)
    grad = random(*shape, dtype=dtype, device=device, seed=4)
    actual = differentiated(lambda *t: norm_module._rms_norm(*t, 0.7, -1.3, EPS), tensors, grad)
    wide = [None if x is None else x.double() for x in tensors]
    expected = differentiated(lambda *t: definition(*t, 0.7, -1.3), wide, grad.double())
    num_rows = grad.numel() // shape[-1]
    terms = [max(num_rows, shape[-1]) if x.ndim < len(shape) else shape[-1] for x in expected]
    assert len(actual) == len(expected) == 1 + sum(x is not None for x in tensors)
    for a, e, num_terms in zip(actual, expected, terms, strict=True):
        as_exact(a, e, a.dtype, num_terms)


@runs_kernels
@pytest.mark.parametrize(("programs", "columns"), [(1, 1), (300, 37), (528, 16)])
def test_triton_sums_of_partial_sums_are_rounded_once(programs, columns, device):
    from kernels_triton.partial_sums import column_sums

    rows = random(programs, columns, dtype=torch.float32, device=device)
    output = torch.empty(columns, dtype=torch.bfloat16, device=device)
    column_sums(rows, output)
    as_exact(output, rows.double().sum(0), torch.bfloat16, programs)


@runs_kernels
def test_a_triton_norm_of_nothing_is_empty(device):
    x, *_, weight = arguments_of("alone", (0, 3, 32), torch.float32, device)
    function = lambda x, w: norm_module._rms_norm(x, None, None, None, w, 1.0, 1.0, EPS)  # noqa: E731
    output, grad_x, grad_weight = differentiated(function, (x, weight), x)
    assert output.shape == grad_x.shape == (0, 3, 32)
    assert torch.equal(grad_weight, torch.zeros_like(weight))


@runs_kernels
def test_triton_gradients_of_strided_rows_are_right(device):
    """Rows that lie apart, as the last tokens of each sequence do, and a gradient spread out."""
    whole = random(4, 9, 64, dtype=torch.float32, device=device)
    x, *_, weight = arguments_of("alone", (4, 9, 64), torch.float32, device)
    x, grad = x[:, -3:], whole[:, :1].expand(4, 3, 64)
    function = lambda x, w: norm_module._rms_norm(x, None, None, None, w, 1.0, 1.0, EPS)  # noqa: E731
    actual = differentiated(function, (x, weight), grad)
    wide = lambda x, w: definition(x, None, None, None, w, 1.0, 1.0)  # noqa: E731
    expected = differentiated(wide, (x.double(), weight.double()), grad.double())
    for a, e in zip(actual, expected, strict=True):
        as_exact(a, e, torch.float32, 64)


@runs_kernels
@pytest.mark.parametrize("form", FORMS)
def test_triton_norms_are_sound_custom_ops(form, device):
    tensors = arguments_of(form, (3, 5, 32), torch.float32, device)
    given = [None if x is None else x.requires_grad_() for x in tensors]
    torch.library.opcheck(torch.ops.attnlab.rms_norm.default, (*given, 0.7, 1.3, EPS))


@pytest.mark.parametrize("form", FORMS)
def test_the_module_is_torchs_where_no_kernel_runs(form):
    x, plus, gate, scale, weight = arguments_of(form, (3, 5, 32), torch.float64, "cpu")
    layer = RMSNorm(32, eps=EPS, dtype=torch.float64)
    assert list(layer.state_dict()) == ["weight"]
    layer.weight.data = weight
    actual = layer(x, plus=plus, alpha=0.7, beta=-1.3, gate=gate, scale=scale)
    expected = definition(x, plus, gate, scale, weight, 0.7, -1.3)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


def test_a_gate_and_a_scale_are_refused_together():
    x = torch.zeros(3, 32)
    with pytest.raises(ValueError, match="expected a gate or a scale, got both"):
        RMSNorm(32, eps=EPS)(x, gate=x, scale=x[:, 0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_module_on_a_gpu_is_as_exact_as_torchs(dtype):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    layer = RMSNorm(128, eps=EPS, dtype=dtype, device="cuda")
    x, *_, weight = arguments_of("alone", (4, 300, 128), dtype, "cuda")
    layer.weight.data = weight
    kernel = differentiated(lambda x: layer(x), (x,), x)
    torchs = differentiated(lambda x: F.rms_norm(x, (128,), weight, EPS), (x,), x)
    for a, b in zip(kernel, torchs, strict=True):
        as_exact(a, b.double(), dtype, 128)


@pytest.mark.gpu
def test_a_norm_runs_in_a_cuda_graph_and_under_torch_compile():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    layer = RMSNorm(128, eps=EPS, dtype=torch.bfloat16, device="cuda")
    x, plus, gate, *_ = arguments_of("sum and gate", (300, 128), torch.bfloat16, "cuda")
    call = lambda x: layer(x, plus=plus, gate=gate)  # noqa: E731
    expected = differentiated(call, (x,), x)
    compiled = differentiated(torch.compile(call, fullgraph=True), (x,), x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = differentiated(call, (x,), x)
    graph.replay()
    for others in (compiled, captured):
        for a, b in zip(others, expected, strict=True):
            assert torch.equal(a, b)
