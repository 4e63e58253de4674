"""What is particular to the chunked PyTorch backend: its decay gradient, its memory, its op."""

import pytest
import torch

import attnlab
from attnlab import chunked
from bench.worker import peak_bytes, trace_allocations


def inputs(T, H=2, K=16, V=16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, H, T, d, generator=generator, dtype=dtype) for d in (K, K, V))
    return q, k, v, -torch.linspace(0.0, 0.05, H, dtype=dtype)


def test_the_decay_has_the_gradient_of_the_definition_over_many_segments():
    q, k, v, g = inputs(T=3000)
    grads = []
    for backend in ("torch", "reference"):
        leaf = g.clone().requires_grad_()
        output, state = attnlab.lightning_attention(
            q, k, v, leaf, return_final_state=True, backend=backend
        )
        grads.append(torch.autograd.grad(output.sin().sum() + state.sin().sum(), leaf)[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("T", [70, 130])
def test_the_custom_op_passes_opcheck(T):
    q, k, v, g = inputs(T, dtype=torch.float32)
    for x in (q, k, v):
        x.requires_grad_()
    state = torch.randn(1, 2, 16, 16, requires_grad=True)
    op = torch.ops.attnlab.lightning_chunked.default
    torch.library.opcheck(op, (q, k, v, g, state, None, 0.5, True))
    bounds = torch.tensor([0, 30, T])
    torch.library.opcheck(op, (q, k, v, g, None, bounds, 0.5, True))


def test_memory_grows_with_the_length_and_nothing_square_is_allocated():
    def largest_and_peak(T):
        q, k, v, g = inputs(T, H=1, dtype=torch.float32)
        for x in (q, k, v):
            x.requires_grad_()

        def run():
            output = attnlab.lightning_attention(q, k, v, g, backend="torch").output
            torch.autograd.grad(output.sum(), (q, k, v))

        run()
        _, sizes = trace_allocations(run)
        return max(sizes), peak_bytes(sizes)

    # Buffers of a segment and their like do not grow at all; tensors of T x D do, and no others.
    (largest, total), (largest_4, total_4) = (largest_and_peak(T) for T in (8192, 4 * 8192))
    tensor = 8192 * 16 * 4
    assert largest_4 <= 4 * tensor + 2**16
    assert total_4 - total <= 3 * 8 * tensor
    assert largest >= tensor


def test_a_segment_of_every_shape_covers_each_token_once():
    for bounds in ([0, 1], [0, 64], [0, 65], [0, 5000], [0, 0, 7, 4000, 4000, 4063]):
        for rows in (1, 5, 100):
            segments = list(chunked._segments(bounds, rows, "cpu"))
            tokens = [t for s in segments for t in range(s.start, s.stop)]
            assert tokens == list(range(bounds[-1]))
            assert all(s.num_chunks * s.chunk == s.stop - s.start for s in segments)
            limit = chunked._max_segments(bounds[-1], len(bounds) - 1, rows, "cpu")
            assert len(segments) <= limit
