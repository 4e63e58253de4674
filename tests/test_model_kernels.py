"""The kernels around a model's mixers compile for GPUs without spills, and never for a length.

Compiling needs no GPU but a process that doesn't interpret: `python -m tests.test_model_kernels 9`.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.test_triton import CAN_RUN, ROOT, CompilingDriver, print_row

CASES = [(torch.bfloat16, 32), (torch.bfloat16, 128), (torch.bfloat16, 6144), (torch.float32, 128)]
KERNELS = ("rms_norm", "convolution", "silu_heads", "column_sums")


@pytest.mark.skipif(CAN_RUN, reason="compiled where no kernel can run")
@pytest.mark.parametrize("capability", [9, 8])
def test_all_compile_without_spills(capability):
    command = [sys.executable, "-m", "tests.test_model_kernels", str(capability)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    for name in KERNELS:
        own = [row for row in rows if name in row["kernel"]]
        assert {row["dim"] for row in own} == {width for _, width in CASES}, name
    for row in rows:
        assert row["stack"] == 0 and not any(row["spills"]), row


def calls(dtype, width, num_tokens):
    """Every kernel on `[T, D]`, in all its forms."""
    from kernels_triton import convolution, heads, norm

    x = torch.empty(num_tokens, width, dtype=dtype)
    for optional in ({}, {"y": x, "gate": x}, {"scale": torch.empty(num_tokens)}):
        norm.rms_norm(x, x[0], 1e-5, **optional)
        norm.rms_norm_backward(x, x, x[0], 1e-5, **optional)
    qkv = torch.empty(1, num_tokens, 3 * width, dtype=dtype)
    grads = heads.silu_heads(qkv, min(width, 256))
    heads.silu_heads_backward(grads, qkv, heads_first=False)
    grads = [grad.transpose(1, 2).contiguous() for grad in grads]
    heads.silu_heads_backward(grads, qkv, heads_first=True)
    x, taps = x[None], torch.empty(width, 4, dtype=dtype)
    sequence = torch.zeros(num_tokens, dtype=torch.int64)
    convolution.convolution(x, taps, before=torch.empty(1, 3, width, dtype=dtype))
    for packed in (None, sequence):
        convolution.convolution(x, taps, packed)
        convolution.convolution_backward(x, x, taps, packed)


def compile_all(capability):
    """Print a row for each kernel."""
    import triton
    from triton.runtime.jit import JITFunction

    triton.runtime.driver.set_active(CompilingDriver(capability))
    run, kernels = JITFunction.run, []

    def compile_only(self, *arguments, grid, warmup, **flags):
        kernels.append((self.fn.__name__, run(self, *arguments, grid=grid, warmup=True, **flags)))

    JITFunction.run = compile_only
    for dtype, width in CASES:
        made = []
        for num_tokens in (1, 200, 256):
            kernels.clear()
            calls(dtype, width, num_tokens)
            made.append(list(kernels))
        assert made[0] == made[1] == made[2], "compiled anew for another length"
        for name, kernel in dict.fromkeys(made[0]):
            print_row(name, str(dtype), width, kernel)


if __name__ == "__main__":
    compile_all(int(sys.argv[1]))
