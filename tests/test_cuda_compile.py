"""Every instance of the CUDA kernels compiles for sm_80 and sm_90a, fits, and spills nothing.

`python -m tests.test_cuda_compile` prints registers, stack and shared memory of each. No GPU is needed.
"""

import itertools
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from kernels_cuda import lightning, lightning_decode, module, tiles
from tests import nvrtc

ARCHITECTURES = {"sm_80": (8, 0), "sm_90a": (9, 0)}
STACK_ALLOWED = 0  # bytes: an array that lies in local memory, or a spill
REGISTERS_OF_SM = 65536


def instances(capability):
    """All that the backend can ask for on a GPU, by what it is for."""
    for dtype, split, dims in itertools.product(
        lightning.ELEMENTS, ("default", "high"), itertools.product(tiles.DIMS, repeat=2)
    ):
        tile = tiles.scan_tile(max(dims), capability)
        yield lightning.instance_of(dims[0], dtype, tile, split), tile
    for dtype, dims, vector in itertools.product(
        lightning.ELEMENTS, itertools.product(tiles.DIMS, repeat=2), (1, 4)
    ):
        yield lightning_decode.instance_of(*dims, dtype, vector), None
    yield lightning.PREFIX, None
    if capability[0] == 9:
        for dtype, ((dim, kind), tile) in itertools.product(
            lightning.ELEMENTS, tiles.HOPPER_SCAN.items()
        ):
            precision = "high" if kind == "high" else "default"
            yield lightning.instance_of(dim, dtype, tile, precision), tile
            if kind == "narrow":  # dims: that of b may be the smaller
                yield lightning.instance_of(64, dtype, tile, precision), tile


def rows(architecture, folder):
    """Instance, tile, registers and stack, for each tile with which an instance is used."""
    pairs = list(dict.fromkeys(instances(ARCHITECTURES[architecture])))
    distinct = list(dict.fromkeys(instance for instance, _ in pairs))

    def used(number):
        own = folder / str(number)
        own.mkdir()
        code, log = nvrtc.compiled(distinct[number], architecture)
        return nvrtc.resources(code, own) | {"log": log}

    with ThreadPoolExecutor(2) as pool:
        by_instance = dict(zip(distinct, pool.map(used, range(len(distinct))), strict=True))
    return [(instance, tile, by_instance[instance]) for instance, tile in pairs]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_instance_compiles_without_spills_and_fits(architecture, tmp_path):
    compiled = rows(architecture, tmp_path)
    assert len(compiled) >= 25
    limit = tiles.shared_kib(ARCHITECTURES[architecture]) << 10
    for instance, tile, used in compiled:
        assert used["stack"] <= STACK_ALLOWED, (instance, used)
        assert "Performance Loss" not in used["log"], (instance, used)  # products made to wait
        assert instance.shared_bytes <= limit, instance
        if tile is not None and not (instance.name == "scan" and "true" in instance.arguments):
            together = tile.programs_per_sm
            reserved = 1024  # bytes of each block's shared memory
            assert together * (instance.shared_bytes + reserved) <= limit + reserved, instance
            assert together * instance.num_threads * used["registers"] <= REGISTERS_OF_SM, used


def test_a_spill_would_be_seen(tmp_path):
    source = """extern "C" __global__ void spill(float* x, int n) {
        float y[64];
        for (int i = 0; i < 64; ++i) y[i * n % 64] = x[i];
        x[0] = y[n];
    }"""
    code = module.compile_source(nvrtc, source, ("--gpu-architecture=sm_90a",), "spill")
    assert nvrtc.resources(code, tmp_path)["stack"] >= 256


def test_a_failed_compilation_shows_the_compilers_words_with_file_and_line():
    instance = lightning.instance_of(64, torch.bfloat16, tiles.scan_tile(64, (9, 0)), "default")
    broken = instance.source().replace("float state[", "floot state[")
    with pytest.raises(module.KernelError, match=r'scan\.cu\(\d+\): error: .*"floot"'):
        module.compile_source(nvrtc, broken, ("--gpu-architecture=sm_90a",), "scan")


def test_code_is_compiled_once_and_found_on_disk_afterwards(monkeypatch, tmp_path):
    cupy, cuda = type(sys)("cupy"), type(sys)("cupy.cuda")
    cuda.nvrtc, nvrtc.getVersion = nvrtc, lambda: (13, 0)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    monkeypatch.setattr(module, "CACHE", tmp_path / "cubins")
    compiled = module.cubin(lightning.PREFIX, "sm_80")
    monkeypatch.setattr(module, "compile_source", None)  # any further compilation fails
    assert module.cubin(lightning.PREFIX, "sm_80") == compiled
    with pytest.raises(TypeError):
        module.cubin(lightning.PREFIX, "sm_90a")


if __name__ == "__main__":
    for name in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            for instance, _, used in rows(name, Path(folder)):
                kernel = f"{instance.name}<{instance.arguments}>"
                use = f"{used['registers']:3} registers, {used['stack']} bytes of stack"
                print(f"{name:7} {kernel:40} {use}, {instance.shared_bytes} shared", flush=True)
