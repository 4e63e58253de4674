"""The CUDA kernels, compiled as C++ for this machine's CPU: what they compute, without a GPU.

`ptx.cuh` here takes the place of the kernels' own; all else of their sources is compiled as it is.
As a pytest plugin (`-p tests.cuda_on_host`) it lets backend "cuda" run on CPU tensors that way. With
`--hopper`, for which a GPU serves too, the kernels for Hopper run.
"""

import ctypes
import hashlib
import struct
import subprocess
import tempfile
from pathlib import Path

import torch

from kernels_cuda import lightning, module, tiles
from kernels_cuda.module import Instance, KernelError
from kernels_cuda.tensor_map import MAP_BYTES, layout

HERE = Path(__file__).parent
BUILDS = Path(tempfile.gettempdir()) / "attnlab_cuda_on_host"
OPTIONS = ("-std=c++17", "-O2", "-ftree-vectorize", "-fPIC", "-shared", "-pthread", "-w")
ENTRY = """
extern "C" const char* launch(const void* params, unsigned grid, unsigned threads, int eager) {
    host::copies_are_eager = eager;
    return host::run_grid(%s, params, grid, threads, CLUSTER_SIZE);
}
"""


class HostLoader:
    """Builds kernels with g++; `capability` is that of the GPU whose table of tiles is used.

    With `copies_are_eager` an asynchronous copy happens at once, else when it is waited for. `change`
    replaces a piece of text of the kernels that have it, for planted defects.
    """

    def __init__(
        self,
        capability: tuple[int, int] = (9, 0),
        *,
        copies_are_eager: bool = False,
        change: tuple[str, str] | None = None,
    ) -> None:
        self._capability, self._copies_are_eager = capability, copies_are_eager
        self._change = change

    def why_not(self, device_type: str) -> str | None:
        return None if device_type == "cpu" else f"runs on the CPU here, got {device_type}"

    def capability(self, device: torch.device) -> tuple[int, int]:
        return self._capability

    def tensor_map(self, x: torch.Tensor) -> bytes:
        sizes, strides = layout(x.shape, x.stride())
        return struct.pack("P3q4i", x.data_ptr(), *strides, *sizes).ljust(MAP_BYTES, b"\0")

    def load(self, instance: Instance, device: torch.device) -> module.Kernel:
        function = ctypes.CDLL(str(built(instance, self._change))).launch
        function.restype = ctypes.c_char_p

        def launch(grid: int, params: bytes, device: torch.device) -> None:
            eager = int(self._copies_are_eager)
            failure = function(params, grid, instance.num_threads, eager)
            if failure:
                raise KernelError(failure.decode())

        return launch


def built(instance: Instance, change: tuple[str, str] | None = None) -> Path:
    """The library of an instance, from an earlier build of the same text where there is one."""
    text = instance.source(HERE) + ENTRY % instance.name
    if change is not None:
        text = text.replace(*change)
    path = BUILDS / f"{hashlib.sha256(' '.join((text, *OPTIONS)).encode()).hexdigest()}.so"
    if not path.exists():
        BUILDS.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILDS) as folder:
            source, library = Path(folder) / "kernel.cpp", Path(folder) / "kernel.so"
            source.write_text(text)
            command = ["g++", *OPTIONS, str(source), "-o", str(library)]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                raise KernelError(f"{instance.name} could not be compiled\n{result.stderr[:4000]}")
            library.replace(path)
    return path


def pytest_addoption(parser) -> None:
    """Options of the plugin."""
    help_ = "run the kernels for Hopper, with the tiles of many tokens"
    parser.addoption("--hopper", action="store_true", help=help_)


def pytest_configure(config) -> None:
    """Let the backend run on the CPU in this process, unless there is a GPU."""
    loader = module.loader if torch.cuda.is_available() else HostLoader()
    load, config.kernel_names = loader.load, set()

    def noted(instance: Instance, device: torch.device) -> module.Kernel:
        config.kernel_names.add(instance.name)
        return load(instance, device)

    loader.load = noted
    module.loader = loader
    lightning.use_hopper(config.getoption("--hopper"))
    tiles.SHORT = 0


def pytest_terminal_summary(terminalreporter, config) -> None:
    """Say which kernels ran."""
    terminalreporter.write_line(f"kernels: {', '.join(sorted(config.kernel_names))}")
