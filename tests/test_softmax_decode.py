"""The kernels behind `softmax_decode`: splits of all sizes, what lies behind a row's end, capture.

As in `test_triton`: kernels run on a GPU or interpreted, in a process of their own if need be, and
this file, run as a script, compiles them.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from test_triton import (
    CAN_RUN,
    ROOT,
    SHARED_BYTES,
    CompilingDriver,
    print_row,
    run_python,
    runs_kernels,
)

import attnlab
from attnlab import testing
from attnlab.problem import Problem
from attnlab.testing import assert_as_accurate


@pytest.mark.skipif(CAN_RUN, reason="the kernels run in this process")
def test_everything_here_passes_interpreted():
    result = run_python("-m", "pytest", "-q", "-x", __file__, interpret=True)
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout


def inputs_of(device, *, B=3, H=4, G=2, C=700, dims=(64, 64), dtype=torch.bfloat16):
    problem = Problem(
        op="softmax_decode",
        batch=B,
        heads=H,
        kv_heads=G,
        q_len=1,
        kv_len=C,
        key_dim=dims[0],
        value_dim=dims[1],
        dtype=dtype,
        device=device,
    )
    return testing.make_inputs(problem)


def decode(inputs, lengths, **flags):
    tensors = inputs.query, inputs.key, inputs.value, lengths
    return attnlab.softmax_decode(*tensors, backend="triton", **flags)


def assert_right(actual, inputs, lengths):
    slots = torch.arange(inputs.key.shape[2], device=lengths.device)
    seen = (slots < lengths[:, None])[:, None, None]
    oracle = testing.softmax_oracle(inputs, attn_mask=seen)["output"]
    baseline = testing.softmax_baseline(inputs, attn_mask=seen)["output"]
    assert_as_accurate(actual, oracle, baseline)


@pytest.fixture(params=[1, 7, 132], ids=["1mp", "7mp", "132mp"])
def multiprocessors(request, monkeypatch):
    """Splits as on a device with so many multiprocessors, whatever runs them."""
    from attnlab import triton_softmax

    monkeypatch.setattr(triton_softmax, "num_multiprocessors", lambda device: request.param)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [(700, 1, 0), (641, 129, 128), (64, 257, 699)], ids=str)
def test_however_a_row_is_split_the_output_is_right(lengths, dtype, multiprocessors, device):
    inputs, lengths = inputs_of(device, dtype=dtype), torch.tensor(lengths, device=device)
    assert_right(decode(inputs, lengths), inputs, lengths)


@runs_kernels
def test_splits_of_very_different_scores_are_weighed_right(multiprocessors, device):
    """The largest score lies in the first slots, then in the last: all other weights vanish."""
    inputs = inputs_of(device, B=2, C=600, dtype=torch.float32)
    heads = inputs.query[:, ::2]  # [B, G, 1, K]
    inputs.key[0, :, :3] = 20 * heads[0]
    inputs.key[1, :, -3:] = 20 * heads[1]
    lengths = torch.tensor([600, 600], device=device)
    assert_right(decode(inputs, lengths), inputs, lengths)


@runs_kernels
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_what_lies_behind_a_row_is_of_no_account(backend, device):
    inputs, lengths = inputs_of(device), torch.tensor([500, 0, 33], device=device)
    args = inputs.query, inputs.key, inputs.value, lengths
    clean = attnlab.softmax_decode(*args, backend=backend)
    for row, length in enumerate(lengths.tolist()):
        inputs.key[row, :, length:] = inputs.value[row, :, length:] = float("nan")
    assert torch.equal(attnlab.softmax_decode(*args, backend=backend), clean)
    assert (clean[1] == 0).all() and (clean[0] != 0).all()


@runs_kernels
def test_lengths_are_integers_of_either_size_and_end_with_the_cache(device):
    from kernels_triton.softmax_decode import attend

    inputs, lengths = inputs_of(device), torch.tensor([700, 20, 300], device=device)
    flags = {"scale": 0.125, "num_multiprocessors": 7}
    args = inputs.query, inputs.key, inputs.value
    expected = attend(*args, lengths, **flags)
    assert torch.equal(attend(*args, lengths.int(), **flags), expected)
    lengths[0] = 1 << 40
    assert torch.equal(attend(*args, lengths, **flags), expected)
    lengths[2] = 300 - (1 << 40)
    assert (attend(*args, lengths, **flags)[2] == 0).all()


@runs_kernels
def test_a_row_alone_differs_by_rounding_from_the_row_in_a_batch(device):
    inputs, lengths = inputs_of(device, dtype=torch.float32), torch.tensor([700, 20, 300])
    lengths = lengths.to(device)
    whole = decode(inputs, lengths)
    args = (x[2:] for x in (inputs.query, inputs.key, inputs.value, lengths))
    alone = attnlab.softmax_decode(*args, backend="triton")
    torch.testing.assert_close(whole[2:], alone, rtol=1e-5, atol=1e-6)
    assert torch.equal(decode(inputs, lengths), whole)


@runs_kernels
def test_the_op_passes_opcheck(device):
    inputs, lengths = inputs_of(device, C=150), torch.tensor([150, 0, 9], device=device)
    args = inputs.query, inputs.key, inputs.value, lengths, 0.5
    torch.library.opcheck(torch.ops.attnlab.softmax_decode_triton.default, args)


@pytest.mark.parametrize(
    ("capacity", "tiles", "splits"),
    [
        (1 << 17, 4, 198),  # one row, 4 key heads: 2 rounds of 396 programs
        (1 << 17, 1, 396),  # one key head: it takes as many to occupy the device
        (1 << 17, 256, 6),  # 64 rows: 4 rounds, in which lengths even out
        (1 << 17, 5000, 1),
        (2048, 4, 16),  # a split is worth 128 slots
        (1, 4, 1),
    ],
)
def test_splits_fill_the_device_in_whole_rounds(capacity, tiles, splits):
    pytest.importorskip("triton")
    from kernels_triton.softmax_decode import num_splits

    assert num_splits(capacity, tiles, 132) == splits


LONG_STRIDE = """
import torch
from triton.runtime.interpreter import GridExecutor
from attnlab import reference
from kernels_triton.softmax_decode import attend
GridExecutor._restore_args_dev = lambda *arguments: None  # it would touch all memory
slots, stride, dim = 65, 1 << 26, 32
storage = torch.empty((slots - 1) * stride + dim, dtype=torch.bfloat16)
cache = storage.as_strided((1, 1, slots, dim), (storage.numel(), storage.numel(), stride, 1))
near = torch.randn(1, 1, slots, dim).bfloat16()
cache.copy_(near)
query, lengths = torch.randn(1, 1, 1, dim).bfloat16(), torch.tensor([slots])
output = attend(query, cache, cache, lengths, scale=0.2, num_multiprocessors=4)
want = reference.softmax_decode(query, near, near, lengths, scale=0.2)
print(float((output.float() - want.float()).norm() / want.float().norm()))
"""


@pytest.mark.skipif(CAN_RUN, reason="starts its own interpreter")
def test_offsets_beyond_32_bits_are_right():
    result = run_python("-c", LONG_STRIDE, interpret=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert float(result.stdout) < 1e-2  # of two roundings to bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("B", "C", "lengths"),
    [(1, 1 << 17, [131_072]), (1, 1 << 17, [100_001]), (5, 20_000, [20_000, 1, 0, 7777, 129])],
    ids=str,
)
def test_long_caches_are_right(B, C, lengths, dtype):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    inputs = inputs_of("cuda", B=B, H=16, G=4, C=C, dims=(128, 128), dtype=dtype)
    lengths = torch.tensor(lengths, device="cuda")
    assert_right(decode(inputs, lengths), inputs, lengths)


@pytest.mark.gpu
def test_a_captured_graph_serves_while_lengths_grow():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    inputs = inputs_of("cuda", C=5000)
    lengths = torch.tensor([3, 0, 100], device="cuda")
    eager = decode(inputs, lengths)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = decode(inputs, lengths)
    graph.replay()
    assert torch.equal(output, eager)
    for _ in range(5):
        lengths += torch.tensor([900, 1, 333], device="cuda")
        graph.replay()
        assert torch.equal(output, decode(inputs, lengths))
        assert_right(output, inputs, lengths)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_a_step_over_a_cache_does_not_wait_for_the_gpu(backend):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    inputs, lengths = inputs_of("cuda"), torch.tensor([3, 0, 100], device="cuda")
    args = inputs.query, inputs.key, inputs.value, lengths
    attnlab.softmax_decode(*args, span=100, backend=backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        attnlab.softmax_decode(*args, span=100, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(CAN_RUN, reason="compiled where no kernel can run")
def test_the_kernels_compile_without_spills_once_for_all_lengths():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    for capability, most in SHARED_BYTES.items():
        command = [sys.executable, __file__, str(capability)]
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr[-4000:]
        rows = [json.loads(line) for line in result.stdout.splitlines()]
        assert {row["kernel"] for row in rows} == {"split_kernel", "merge_kernel"}
        assert len(rows) == 2 * 2 * 4
        places = 3 if capability == 9 else 2  # programs a multiprocessor, 1 KiB reserved for each
        for row in rows:
            assert row["stack"] == 0 and not any(row["spills"]), row
            if row["kind"] == "16-bit":
                assert places * (row["shared"] + 1024) <= most + 1024, row


def compile_kernels(capability):
    """Print a row for each kernel that the launches compile for a capability."""
    import triton
    from triton.runtime.jit import JITFunction

    from kernels_triton.softmax_decode import attend

    triton.runtime.driver.set_active(CompilingDriver(capability))
    run, kernels = JITFunction.run, []

    def compile_only(self, *arguments, grid, warmup, **flags):
        kernels.append((self.fn.__name__, run(self, *arguments, grid=grid, warmup=True, **flags)))

    JITFunction.run = compile_only
    lengths = torch.zeros(1, dtype=torch.int64)
    for kind, dtype in (("16-bit", torch.bfloat16), ("float32", torch.float32)):
        for dim in (32, 64, 128, 256):
            kernels.clear()
            for capacity in (1 << 17, (1 << 17) + 5):
                cache = torch.empty(1, 1, capacity, dim, dtype=dtype).expand(-1, 4, -1, -1)
                query = torch.empty(1, 16, 1, dim, dtype=dtype)
                attend(query, cache, cache, lengths, scale=0.1, num_multiprocessors=132)
            assert kernels[:2] == kernels[2:], "compiled anew for another capacity"
            for name, kernel in kernels[:2]:
                print_row(name, kind, dim, kernel)


if __name__ == "__main__":
    compile_kernels(int(sys.argv[1]))
