"""A remembered launch starts the kernel that Triton would choose, with the arguments Triton would pass.

Kernels are compiled and "launched" on a driver that only writes down what it is given: run as a
script, in a process of its own, since the driver is Triton's global.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnlab.testing import make_inputs

ROOT = Path(__file__).resolve().parent.parent
WRITES_DOWN = os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available()


class WritingDriver:
    """Stands for a GPU: compiles for it, and writes down which kernel is started with what."""

    def __init__(self):
        self.launches = []

        class Launcher:
            def __init__(self, src, metadata):
                pass

            def __call__(own, x, y, z, stream, function, packed, launch, enter, leave, *arguments):
                self.launches.append([function, [x, y, z], [written(a) for a in arguments]])

        self.launcher_cls = Launcher
        self.loaded = 0
        self.utils = self

    def load_binary(self, name, kernel, shared, device):
        self.loaded += 1
        return "module", f"{name} {self.loaded}", 0, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 227 << 10}

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def written(argument):
    """What tells an argument of a launch from another one, of equal memory or not."""
    if isinstance(argument, torch.Tensor):
        return [str(argument.dtype), list(argument.shape), argument.data_ptr() % 16]
    if hasattr(argument, "block_shape"):
        shapes = list(argument.shape), list(argument.strides), list(argument.block_shape)
        return [written(argument.base), *shapes]
    return [written(a) for a in argument] if isinstance(argument, tuple) else argument


def misaligned(x):
    """The same values at an address that is not a multiple of 16."""
    storage = torch.empty(x.numel() + 1, dtype=x.dtype)
    return storage[1:].view(x.shape).copy_(x)


def calls():
    """Calls by name that differ in what compiled code may depend on."""
    from attnlab import triton_backend, triton_softmax
    from attnlab.problem import Problem
    from attnlab.schedules import forced_plan
    from kernels_triton import convolution, heads, norm

    def inputs(T=200, dtype=torch.bfloat16, B=1):
        shape = {"batch": B, "heads": 2, "kv_heads": 2, "q_len": T, "kv_len": T}
        dims = {"key_dim": 32, "value_dim": 32, "dtype": dtype, "device": "cpu"}
        return make_inputs(Problem(op="lightning_attention", **shape, **dims))

    x, half, longer = inputs(), inputs(dtype=torch.float16), inputs(T=333, B=3)
    odd = misaligned(x.log_decay)

    def attend(i, decay=None, **flags):
        decay = i.log_decay if decay is None else decay
        triton_backend.lightning_attention(i.query, i.key, i.value, decay, **flags)

    def differentiate(i, **flags):
        qkv = [t.clone().requires_grad_() for t in (i.query, i.key, i.value)]
        output, _ = triton_backend.lightning_attention(*qkv, i.log_decay, **flags)
        output.backward(i.grad_output)

    def segments(i):
        with forced_plan("two-pass", 3):
            attend(i)

    def step(i, decay=None, pool=None, slots=None, t=0):
        qkv = [s[:, :, t : t + 1] for s in (i.query, i.key, i.value)]
        state = i.initial_state.clone() if pool is None else pool
        decay = i.log_decay if decay is None else decay
        triton_backend.lightning_decode_(*qkv, decay, state, slots=slots)

    def over_cache(capacity, dtype=torch.bfloat16, length_dtype=torch.int64):
        keys, lengths = torch.zeros(1, 2, capacity, 32, dtype=dtype), torch.tensor([7])
        query = torch.zeros(1, 4, 1, 32, dtype=dtype)
        triton_softmax.softmax_decode(query, keys, keys, lengths.to(length_dtype))

    def around_mixers(num_tokens):
        """Each kernel of a layer that stands outside of its mixer, and its backward."""
        x = torch.zeros(1, num_tokens, 96, dtype=torch.bfloat16)
        norm.rms_norm_backward(norm.rms_norm(x, x[0, 0], 1e-5, y=x), x, x[0, 0], 1e-5, gate=x)
        norm.rms_norm(x, x[0, 0], 1e-5, scale=torch.ones(num_tokens))
        taps = torch.zeros(96, 4, dtype=torch.bfloat16)
        convolution.convolution_backward(convolution.convolution(x, taps), x, taps)
        heads.silu_heads_backward(heads.silu_heads(x, 32), x, heads_first=False)

    wide = torch.zeros(5, 2, 32, 40)[..., :32]
    return {
        "forward": lambda: attend(x),
        "another length": lambda: attend(longer),
        "float16": lambda: attend(half),
        "decays at an odd address": lambda: attend(x, odd),
        "initial state": lambda: attend(x, initial_state=x.initial_state),
        "initial state at an odd address": lambda: attend(
            x, initial_state=misaligned(x.initial_state)
        ),
        "final state": lambda: attend(x, return_final_state=True),
        "scale that is an integer": lambda: attend(x, scale=1),
        "backward": lambda: differentiate(x),
        "backward to the state": lambda: differentiate(x, initial_state=x.initial_state),
        "two passes": lambda: segments(longer),
        "pointers": lambda: attend(inputs_by_pointers(x)),
        "decode": lambda: step(x),
        "decode of another token": lambda: step(x, t=3),
        "decode with odd decays": lambda: step(x, odd),
        "decode with a strided state": lambda: step(x, pool=wide[:1]),
        "decode in a pool": lambda: step(x, pool=wide, slots=torch.tensor([2])),
        "decode in a pool, 32-bit slots": lambda: step(
            x, pool=wide, slots=torch.tensor([2], dtype=torch.int32)
        ),
        "over a cache": lambda: over_cache(200),
        "over a longer cache": lambda: over_cache(250),
        "over a cache, 32-bit lengths": lambda: over_cache(200, length_dtype=torch.int32),
        "over a float32 cache": lambda: over_cache(200, dtype=torch.float32),
        "around mixers": lambda: around_mixers(7),
        "around mixers, longer": lambda: around_mixers(256),
    }


def inputs_by_pointers(x):
    """The same inputs with a query that the copy engine refuses."""
    from dataclasses import replace

    return replace(x, query=misaligned(x.query))


def write_down():
    """Print the launches of each call: as Triton chooses, and twice as they are remembered."""
    import triton

    driver = WritingDriver()
    triton.runtime.driver.set_active(driver)
    from kernels_triton import (
        convolution,
        heads,
        lightning_decode,
        norm,
        partial_sums,
        softmax_decode,
    )
    from kernels_triton.lightning import launch

    launchers = [launch._launch_scan, launch._launch_prefix, lightning_decode._launch]
    launchers += [softmax_decode._launch_split, softmax_decode._launch_merge]
    launchers += [
        launcher
        for module in (norm, convolution, heads, partial_sums)
        for name, launcher in vars(module).items()
        if name.startswith("_launch_")
    ]
    found = {}
    for remember in (False, True, True):
        for name, call in calls().items():
            if not remember:
                for launcher in launchers:
                    launcher._compiled.clear()
            driver.launches.clear()
            call()
            found.setdefault(name, []).append(json.loads(json.dumps(driver.launches)))
    print(json.dumps(found))


@pytest.fixture(scope="module")
def launches():
    """By the name of a call, its launches as Triton makes them, and twice from memory."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "tests/test_launcher.py"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.mark.skipif(not WRITES_DOWN, reason="stands for a GPU where there is none")
def test_a_remembered_launch_is_the_one_triton_makes(launches):
    assert len(launches) == 24
    for name, (chosen, first, second) in launches.items():
        assert chosen and chosen == first == second, name


@pytest.mark.skipif(not WRITES_DOWN, reason="stands for a GPU where there is none")
def test_the_calls_differ_in_what_they_start(launches):
    started = {name: [kernel for kernel, *_ in chosen] for name, (chosen, *_) in launches.items()}
    assert started["forward"] == started["another length"] == started["scale that is an integer"]
    assert started["decode"] == started["decode of another token"]
    assert started["over a cache"] == started["over a longer cache"]
    assert started["around mixers"] == started["around mixers, longer"]
    others = [n for n in started if n not in ("another length", "scale that is an integer")]
    others.remove("around mixers, longer")
    others.remove("decode of another token")
    others.remove("over a longer cache")
    different = {json.dumps(started[n]) for n in others}
    assert len(different) == len(others)


if __name__ == "__main__":
    write_down()
