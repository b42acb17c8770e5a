"""CUDA C to machine code, while a model is compiled and not while it is loaded; and CUDA's runtime.

TVM writes CUDA C. Where there is no GPU it stores that as it is, and the machine that loads the
library has to have a compiler of NVIDIA's. Here the code that TVM is about to store is replaced by
what NVRTC (or nvcc) makes of it, as text; loading turns it back. Both are hooks of TVM's.
"""

from __future__ import annotations

import base64
import ctypes
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from graphopt.errors import GraphoptError, MissingError
from graphopt.target import Target

_HINT = "pip install 'graphopt[tvm-cuda]'"
_COMPILED = "graphopt:"
"""What machine code as text begins with."""
_OLDEST = "75"
"""The compute capability whose PTX every GPU that CUDA 13 knows compiles for itself."""
_NAMES = {"nvrtc": ("libnvrtc.so.13", "libnvrtc.so.12"), "cudart": ("libcudart.so.13",)}
_TVM_RUNTIME = "libtvm_runtime_cuda.so"
_DONE = 0


def missing_compiler() -> str | None:
    """Why CUDA C cannot be compiled here, or None."""
    if _nvrtc() is None and _nvcc() is None:
        return f"no compiler for CUDA (NVRTC or nvcc): {_HINT}"
    return None


def missing_runtime() -> str | None:
    """Why TVM does not reach a GPU here, or None. Loads CUDA's runtime and TVM's part for it.

    TVM loads its part when it is imported, and says nothing where CUDA's runtime is not found:
    NVIDIA's wheel puts that into a folder that no loader looks in.
    """
    from graphopt.backends import _cuda_driver

    reason = _cuda_driver.missing()
    if reason is not None:
        return reason
    if _open("cudart", ctypes.RTLD_GLOBAL) is None:
        return f"TVM needs CUDA 13's runtime (libcudart.so.13): {_HINT}"
    tvm: Any = importlib.import_module("tvm")
    if tvm.get_global_func("device_api.cuda", allow_missing=True) is None:
        try:
            _tvm_runtime()
        except OSError as error:
            return f"TVM's runtime for CUDA does not load: {error}"
    return None if tvm.cuda(0).exist else "TVM finds no NVIDIA GPU"


@cache
def _tvm_runtime() -> ctypes.CDLL:
    tvm: Any = importlib.import_module("tvm")
    return ctypes.CDLL(str(Path(tvm.__file__).parent / "lib" / _TVM_RUNTIME))


def hook(target: Target) -> None:
    """Let TVM have the code that it generates from now on compiled for a target."""
    ffi: Any = importlib.import_module("tvm_ffi")
    accept()

    def replace(code: str, *_: Any) -> str:
        return _COMPILED + base64.b64encode(machine_code(code, target.arch)).decode()

    ffi.register_global_func("tvm_callback_cuda_postproc", replace, override=True)


@cache
def accept() -> None:
    """Let TVM take code that is compiled already; other code is its own compiler's, as before."""
    ffi: Any = importlib.import_module("tvm_ffi")
    name = "tvm_callback_cuda_compile"
    importlib.import_module("tvm.support.nvcc")  # where its own is
    own = ffi.get_global_func(name)

    def decode(code: str) -> Any:
        if not code.startswith(_COMPILED):
            return own(code)
        return bytearray(base64.b64decode(code.removeprefix(_COMPILED)))

    ffi.register_global_func(name, decode, override=True)


def machine_code(source: str, arch: str) -> bytes:
    """A cubin for an architecture (`sm_89`); PTX, which any driver compiles, for none.

    Raises:
        MissingError: there is no compiler.
        GraphoptError: the compiler's first error.
    """
    if _nvrtc() is not None:
        return _by_nvrtc(source, arch)
    if _nvcc() is not None:
        return _by_nvcc(source, arch)
    raise MissingError(missing_compiler() or "")


def _by_nvrtc(source: str, arch: str) -> bytes:
    library = _nvrtc()
    program = ctypes.c_void_p()
    include = [f"-I{folder}" for folder in _includes()]
    options = [f"-arch={arch or f'compute_{_OLDEST}'}", "-default-device", "-w", *include]
    array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    begun = library.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None
    )
    if begun != _DONE:
        raise GraphoptError(f"NVRTC does not start (error {begun})")
    try:
        if library.nvrtcCompileProgram(program, len(options), array) != _DONE:
            raise GraphoptError(f"NVRTC: {_first_error(_taken(program, 'ProgramLog').decode())}")
        return _taken(program, "CUBIN" if arch else "PTX")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _taken(program: ctypes.c_void_p, what: str) -> bytes:
    """Something that NVRTC has of a program."""
    library, size = _nvrtc(), ctypes.c_size_t()
    getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    room = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, room)
    return room.raw


def _by_nvcc(source: str, arch: str) -> bytes:
    with tempfile.TemporaryDirectory(prefix="graphopt-cuda-") as folder:
        code, made = Path(folder, "kernels.cu"), Path(folder, "kernels.bin")
        code.write_text(source, "utf-8")
        kind = ["-cubin", f"-arch={arch}"] if arch else ["-ptx", f"-arch=compute_{_OLDEST}"]
        command = [_nvcc() or "", *kind, "-w", "-o", str(made), str(code)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise GraphoptError(f"nvcc: {_first_error(done.stderr or done.stdout)}")
        return made.read_bytes() + (b"" if arch else b"\0")


def _first_error(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return next((line for line in lines if re.search(r"\berror\b", line)), (lines or ["?"])[0])


@cache
def _nvrtc() -> Any:
    """NVRTC with the headers that TVM's code includes; None where either is missing."""
    library = _open("nvrtc", ctypes.RTLD_LOCAL)
    return library if library is not None and _includes() else None


@cache
def _nvcc() -> str | None:
    places = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [f"{place}/bin" for place in (*places, "/usr/local/cuda")]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(folders))


@cache
def _includes() -> tuple[Path, ...]:
    """Folders of headers: CUDA's and those of its C++ library."""
    for root in _roots():
        include = root / "include"
        inner = [include, include / "cccl"]
        if any((folder / "cuda" / "std" / "cstdint").is_file() for folder in inner):
            return tuple(inner)
    return ()


@cache
def _open(name: str, mode: int) -> ctypes.CDLL | None:
    """A library of CUDA's: where the loader finds it, in NVIDIA's wheels, in a toolkit."""
    for file in _NAMES[name]:
        folders = (root / part for root in _roots() for part in ("lib", "lib64"))
        for place in (file, *(str(folder / file) for folder in folders)):
            try:
                return ctypes.CDLL(place, mode)
            except OSError:
                continue
    return None


def _roots() -> Iterator[Path]:
    """Folders that hold `include` and `lib` of CUDA's."""
    package = importlib.util.find_spec("nvidia")
    for folder in (package.submodule_search_locations or ()) if package else ():
        yield from sorted(Path(folder).glob("cu1*"), reverse=True)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            yield Path(os.environ[name])
    nvcc = shutil.which("nvcc")
    if nvcc:
        yield Path(nvcc).resolve().parents[1]
    yield Path("/usr/local/cuda")
