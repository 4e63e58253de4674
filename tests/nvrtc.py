"""NVRTC of the package nvidia-cuda-nvrtc, which needs no driver, with the names of `cupy.cuda.nvrtc`."""

import ctypes
import importlib.util
import re
import subprocess
from functools import cache
from pathlib import Path

from kernels_cuda import module
from kernels_cuda.module import Instance


class NVRTCError(RuntimeError):
    pass


@cache
def library() -> ctypes.CDLL:
    """The newest library that is installed."""
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations if spec else []
    found = sorted(p for root in roots for p in Path(root).glob("cu*/lib/libnvrtc.so.*"))
    if not found:
        raise RuntimeError("expected the package nvidia-cuda-nvrtc, found none")
    return ctypes.CDLL(str(found[-1]))


def _call(name, *arguments):
    code = getattr(library(), f"nvrtc{name}")(*arguments)
    if code:
        library().nvrtcGetErrorString.restype = ctypes.c_char_p
        raise NVRTCError(library().nvrtcGetErrorString(code).decode())


def createProgram(source, name, headers, include_names):
    program = ctypes.c_void_p()
    _call("CreateProgram", ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
    return program


def compileProgram(program, options):
    given = (ctypes.c_char_p * len(options))(*(x.encode() for x in options))
    _call("CompileProgram", program, len(options), given)


def _sized(what, program):
    size = ctypes.c_size_t()
    _call(f"Get{what}Size", program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    _call(f"Get{what}", program, text)
    return text.raw


def getCUBIN(program):
    return _sized("CUBIN", program)


def getProgramLog(program):
    return _sized("ProgramLog", program).rstrip(b"\0").decode()


def destroyProgram(program):
    _call("DestroyProgram", ctypes.byref(program))


def compiled(instance: Instance, architecture: str) -> tuple[bytes, str]:
    """Machine code of an instance, as the backend would make it, and the compiler's words."""
    program = createProgram(instance.source(), instance.name, (), ())
    options = (*module.OPTIONS, f"--gpu-architecture={architecture}", "--ptxas-options=-v")
    try:
        compileProgram(program, options)
    except NVRTCError as error:
        raise NVRTCError(f"{error}: {getProgramLog(program)}") from error
    code, log = getCUBIN(program), getProgramLog(program)
    destroyProgram(program)
    return code, log


def resources(code: bytes, folder: Path) -> dict[str, int]:
    """Registers and bytes of stack of the one kernel in a cubin."""
    from triton.backends import nvidia

    path = folder / "kernel.cubin"
    path.write_bytes(code)
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    command = [str(tool), "--dump-resource-usage", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return {"registers": int(usage[1]), "stack": int(usage[2])}
