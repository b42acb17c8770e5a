"""Targets as TVM has them, and the linkers that make libraries for them."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from graphopt.errors import MissingError
from graphopt.target import Target, host

_LINKERS = {
    "x86_64": ("x86_64-linux-gnu-gcc", "gcc", "cc", "clang"),
    "aarch64": ("aarch64-linux-gnu-gcc", "gcc", "cc", "clang"),
}
_GLIBC = "2.28"
"""The C library's version that Zig links for: that of TVM's wheels, manylinux_2_28."""
_LEVELS = (
    # x86-64 psABI: the microarchitecture levels, the highest first
    ("x86-64-v4", {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "avx2"}),
    ("x86-64-v3", {"avx2", "fma", "f16c"}),
    ("x86-64-v2", {"sse4_2"}),
)
_X86_ATTRIBUTES = {"avx_vnni": "+avxvnni", "avx512_vnni": "+avx512vnni"}
_ARM_ATTRIBUTES = {
    "dotprod": "+dotprod",
    "fp16": "+fullfp16",
    "i8mm": "+i8mm",
    "bf16": "+bf16",
}
_GPU_LIMITS = {"max_threads_per_block": 1024, "max_shared_memory_per_block": 48 << 10}
"""What every GPU grants without being asked for more."""


def missing(target: Target) -> str | None:
    """Why a library for a target cannot be made here, or None."""
    if target.device == "cuda":
        from graphopt.backends import _tvm_cuda

        return _tvm_cuda.missing_compiler() if linker("x86_64") else _advice("x86_64")
    if target.device != "cpu":
        return f"no code is generated for {target.name}: name a device, such as cpu"
    return None if linker(target.arch) else _advice(target.arch)


def _advice(arch: str) -> str:
    package = "gcc" if arch == _own() else f"gcc-{arch.replace('_', '-')}-linux-gnu"
    return f"no linker for {arch}: pip install 'graphopt[linker]', or apt install {package}"


@cache
def linker(arch: str) -> tuple[str, ...] | None:
    """The command that links for an architecture: the machine's compiler, a cross one, or Zig's."""
    names = _LINKERS.get(arch, ())
    for name in names if arch == _own() else names[:1]:
        if shutil.which(name):
            return (name,)
    if names and importlib.util.find_spec("ziglang"):
        return (sys.executable, "-m", "ziglang", "cc", "-target", f"{arch}-linux-gnu.{_GLIBC}")
    return None


def _own() -> str:
    """This machine's architecture."""
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())


def tvm_target(target: Target, threads: int) -> Any:
    """TVM's description of a target; for this machine's CPU with everything that it has."""
    tvm: Any = importlib.import_module("tvm")
    if target.device == "cuda":
        arch = target.arch or "sm_75"
        return tvm.target.Target({"kind": "cuda", "arch": arch, "host": _host(), **_GPU_LIMITS})
    data = {"kind": "llvm", "num-cores": threads, **_cpu(target)}
    return tvm.target.Target(data)


def _host() -> dict[str, Any]:
    return {"kind": "llvm", "mcpu": "x86-64-v2"}


def _cpu(target: Target) -> dict[str, Any]:
    if target.name == "cpu":
        tvm: Any = importlib.import_module("tvm")
        return {"mcpu": str(tvm.get_global_func("target.llvm_get_system_cpu")())}
    if target.arch == "x86_64":
        level = next((name for name, needs in _LEVELS if needs <= target.isa), "x86-64")
        extra = [text for name, text in _X86_ATTRIBUTES.items() if name in target.isa]
        return {"mcpu": level, "mtriple": "x86_64-linux-gnu", **({"mattr": extra} if extra else {})}
    attributes = [text for name, text in _ARM_ATTRIBUTES.items() if name in target.isa]
    model = target.name.partition(":")[2] or "generic"
    return {"mtriple": "aarch64-linux-gnu", "mcpu": model, "mattr": ["+neon", *attributes]}


def pack(objects: list[str], output: str) -> None:
    """Put objects into a .tar, without dates and owners: the same code gives the same bytes."""
    with tarfile.open(output, "w") as archive:
        for index, path in enumerate(sorted(objects)):
            entry = tarfile.TarInfo(f"part{index}{Path(path).suffix}")
            entry.size = Path(path).stat().st_size
            with Path(path).open("rb") as file:
                archive.addfile(entry, file)


def link_packed(packed: Path, output: Path) -> None:
    """Link the objects of a .tar for this machine.

    Raises:
        MissingError: there is nothing to link with.
        RuntimeError: the linker's own words.
    """
    arch = host().arch
    if linker(arch) is None:
        raise MissingError(f"{packed} has to be linked, and there is {_advice(arch)}")
    with tempfile.TemporaryDirectory(prefix="graphopt-link-") as scratch:
        with tarfile.open(packed) as archive:
            for number, member in enumerate(archive):  # by no name of theirs: it may lead elsewhere
                data = archive.extractfile(member)
                if data is not None:
                    Path(scratch, f"{number:04}.o").write_bytes(data.read())
        link([str(path) for path in sorted(Path(scratch).iterdir())], str(output), arch)


def link(objects: list[str], output: str, arch: str) -> None:
    """Link objects into a shared library.

    Raises:
        RuntimeError: the linker's own words.
    """
    options = ("-shared", "-fPIC", "-Wl,--build-id=none", "-s", "-o", output)
    command = (*(linker(arch) or ()), *options, *objects)
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line]
        raise RuntimeError(f"linking failed: {lines[0] if lines else done.returncode}")
