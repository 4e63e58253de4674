"""Kernels from their sources in `src`: compiled once an architecture, cached on disk, launched.

The only module that touches CuPy, which brings NVRTC and the driver's calls. A kernel file holds one
kernel, named as the file, that takes one struct; its template arguments come as a macro. Tensors go
in by their addresses, and launches go to torch's current stream.
"""

import ctypes
import hashlib
import os
import re
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch

from kernels_cuda.tensor_map import tensor_map

SOURCES = Path(__file__).parent / "src"
OPTIONS = ("--std=c++17",)
CACHE = Path.home() / ".cache" / "attnlab" / "cubins"
OLDEST = (8, 0)  # compute capability


class KernelError(RuntimeError):
    """A kernel could not be compiled, loaded or launched; the message holds the compiler's log."""

    def in_short(self) -> str:
        """The message's first line, and the first error of the log."""
        first, *log = str(self).splitlines()
        return "; ".join([first, *[line for line in log if "error" in line][:1]])


@dataclass(frozen=True)
class Instance:
    """A kernel and its template arguments, with what a launch of it takes.

    `shared_bytes` is checked against the kernel's own struct when it is compiled. The blocks of a
    cluster follow one another in the grid.
    """

    name: str
    arguments: str
    num_threads: int
    shared_bytes: int = 0
    cluster_size: int = 1

    def source(self, *folders: Path) -> str:
        """The whole text to compile; a file of `folders` comes before one of the same name here."""
        defines = f"#define TEMPLATE_ARGUMENTS {self.arguments}\n"
        defines += f"#define SHARED_BYTES {self.shared_bytes}\n"
        defines += f"#define CLUSTER_SIZE {self.cluster_size}\n"
        return defines + _inlined(f"{self.name}.cu", (*folders, SOURCES), set())


def _inlined(name: str, folders: tuple[Path, ...], seen: set[str]) -> str:
    """A file with the files it includes put in their places, each once."""
    if name in seen:
        return ""
    seen.add(name)
    text = next(folder / name for folder in folders if (folder / name).exists()).read_text()
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        included = re.fullmatch(r'#include "(.+)"', line)
        if included:
            lines += [_inlined(included[1], folders, seen), f'#line {number + 1} "{name}"']
        elif line != "#pragma once":
            lines.append(line)
    return "\n".join([f'#line 1 "{name}"', *lines])


class Kernel(Protocol):
    """A kernel on a device."""

    def __call__(self, grid: int, params: bytes, device: torch.device) -> None:
        """Launch `grid` blocks with one struct as their parameter."""


class Loader(Protocol):
    """What makes kernels of instances."""

    def why_not(self, device_type: str) -> str | None:
        """Why no kernel runs on this machine's device of a type, None if they do."""

    def capability(self, device: torch.device) -> tuple[int, int]:
        """Compute capability of a device."""

    def tensor_map(self, x: torch.Tensor) -> bytes:
        """What the copy engine wants to know of a tensor."""

    def load(self, instance: Instance, device: torch.device) -> Kernel:
        """Compile and load."""


class Driver:
    """Compiles with NVRTC for the device at hand and launches through the CUDA driver."""

    def why_not(self, device_type: str) -> str | None:
        """Why kernels can't run here, in a sentence."""
        if device_type != "cuda":
            return f"needs a CUDA device, got {device_type}"
        if find_spec("cupy") is None:
            return "needs the package cupy-cuda13x, as attnlab[cuda] installs it"
        if not torch.cuda.is_available():
            return "needs a CUDA driver and a device that torch can use"
        capability = torch.cuda.get_device_capability()
        if capability < OLDEST:
            needed, got = (".".join(map(str, x)) for x in (OLDEST, capability))
            return f"needs compute capability {needed}, got {got}"
        return None

    def capability(self, device: torch.device) -> tuple[int, int]:
        """Compute capability of a device."""
        return torch.cuda.get_device_capability(device)

    def tensor_map(self, x: torch.Tensor) -> bytes:
        """What the copy engine wants to know of a tensor."""
        return tensor_map(x)

    def load(self, instance: Instance, device: torch.device) -> Kernel:
        """The kernel on a device; `KernelError` where it can't be compiled or loaded."""
        major, minor = self.capability(device)
        # Instructions of one architecture alone (wgmma, setmaxnreg) need its own target.
        architecture = f"sm_{major}{minor}{'a' if major >= 9 else ''}"
        return _Launched(instance, cubin(instance, architecture), device)


class _Launched:
    """A loaded kernel."""

    def __init__(self, instance: Instance, code: bytes, device: torch.device) -> None:
        from cupy.cuda import function
        from cupy_backends.cuda.api import driver

        self._instance, self._driver, self._device = instance, driver, device
        with torch.cuda.device(device):
            _ensure_context(driver, device)
            try:
                self._module = function.Module()  # keeps the function alive
                self._module.load(code)
                self._function = self._module.get_function(instance.name).ptr
                attribute = driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                driver.funcSetAttribute(self._function, attribute, instance.shared_bytes)
            except driver.CUDADriverError as error:
                raise KernelError(f"{_title(instance)} could not be loaded: {error}") from error

    def __call__(self, grid: int, params: bytes, device: torch.device) -> None:
        if torch.cuda.current_device() != self._device.index:
            with torch.cuda.device(self._device):
                return self(grid, params, device)
        _ensure_context(self._driver, self._device)
        stream = torch.cuda.current_stream(self._device).cuda_stream
        pointers = (ctypes.c_char_p * 1)(params)  # to the bytes themselves
        threads, shared = self._instance.num_threads, self._instance.shared_bytes
        try:
            self._driver.launchKernel(
                self._function, grid, 1, 1, threads, 1, 1, shared, stream,
                ctypes.addressof(pointers), 0,
            )  # fmt: skip
        except self._driver.CUDADriverError as error:
            title = _title(self._instance)
            raise KernelError(f"{title} could not be launched on {grid} blocks: {error}") from error


def _ensure_context(driver: Any, device: torch.device) -> None:
    """Make the device's context current: a thread of autograd may come without one."""
    if not driver.ctxGetCurrent():
        from cupy_backends.cuda.api import runtime

        runtime.setDevice(device.index)


def _title(instance: Instance) -> str:
    return f"kernel {instance.name}<{instance.arguments}>"


def cubin(instance: Instance, architecture: str) -> bytes:
    """Machine code of an instance, from the cache on disk where it was compiled before."""
    from cupy.cuda import nvrtc

    source = instance.source()
    options = (*OPTIONS, f"--gpu-architecture={architecture}")
    parts = (source, *options, str(nvrtc.getVersion()))
    path = CACHE / f"{hashlib.sha256('|'.join(parts).encode()).hexdigest()}.cubin"
    if path.exists():
        return path.read_bytes()
    code = compile_source(nvrtc, source, options, _title(instance))
    _write(path, code)
    return code


def compile_source(nvrtc: Any, source: str, options: tuple[str, ...], title: str) -> bytes:
    """Machine code of a text; `nvrtc` has the functions of `cupy.cuda.nvrtc`."""
    program = nvrtc.createProgram(source, "kernel.cu", (), ())
    try:
        nvrtc.compileProgram(program, options)
        return nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        raise KernelError(f"{title} could not be compiled: {error}\n{log}") from error
    finally:
        nvrtc.destroyProgram(program)


def _write(path: Path, code: bytes) -> None:
    """Write a file as a whole; a home that can't be written to only costs time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(code)
        os.replace(name, path)
    except OSError:
        pass


loader: Loader = Driver()  # tests put one in its place that builds for the host


@cache
def kernel(instance: Instance, device: torch.device) -> Kernel:
    """The kernel of an instance on a device, compiled and loaded at its first use."""
    return loader.load(instance, device)


def current_device(device_type: str) -> torch.device:
    """The device of a type that calls go to unless they say otherwise."""
    if device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(device_type)


_failures: dict[tuple[Instance, torch.device], str] = {}


def why_not_compiled(instances: list[Instance], device: torch.device) -> str | None:
    """Why one of the kernels can't be compiled or loaded, None if they all are now."""
    for instance in instances:
        key = instance, device
        if key not in _failures:
            try:
                kernel(instance, device)
                continue
            except KernelError as error:
                _failures[key] = error.in_short()  # not tried again
        return _failures[key]
    return None
