"""NVIDIA's driver, its runtime and NVRTC as libraries that run kernels on this machine's CPU.

    python tests/cuda/emulator.py FOLDER     builds them there, and prints the environment to set

TVM's own runtime for CUDA then runs on them as it is. The GPU's memory is closed to the rest of the
process, which crashes where it reads it. Threads of a block take turns from barrier to barrier, so
that wrong indices, bounds and barriers show in the results; what runs at the same time on a GPU,
and how fast, does not, and code that counts on the lockstep of a warp (TVM's running sums) gives
other results here. Needs g++ on x86-64.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("driver.cpp")
HEADER = SOURCE.with_name("device.h")
_VERSIONS = "libcudart.so.13 { global: cuda*; };\n"
"""The runtime's symbols have a version, which what is linked to it asks for."""


def missing() -> str | None:
    """Why it cannot be built here, or None."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "fibers of the emulated GPU are for x86-64"
    return None if shutil.which("g++") else "no C++ compiler for the emulated GPU: apt install g++"


def build(folder: Path) -> None:
    """Build the libraries in a folder, NVRTC in `compiler` below it.

    Raises:
        subprocess.CalledProcessError: the compiler's.
    """
    versions, compiler = folder / "versions", folder / "compiler"
    versions.write_text(_VERSIONS, "utf-8")
    compiler.mkdir(exist_ok=True)
    made = folder / "libcudart.so.13"
    base = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-Wl,-Bsymbolic", str(SOURCE)]
    subprocess.run([*base, f"-Wl,--version-script,{versions}", "-o", str(made), "-ldl"], check=True)
    for copy in (folder / "libcuda.so.1", compiler / "libnvrtc.so.13"):
        shutil.copyfile(made, copy)


def environment(folder: Path, *, gpu: bool = True) -> dict[str, str]:
    """Variables with which programs find what was built: the compiler, and the GPU or none."""
    folders = [folder / "compiler", *([folder] if gpu else [])]
    path = os.environ.get("LD_LIBRARY_PATH")
    return {
        "LD_LIBRARY_PATH": os.pathsep.join([*map(str, folders), *([path] if path else [])]),
        "EMULATED_CUDA_HEADER": str(HEADER),
    }


if __name__ == "__main__":
    build(Path(sys.argv[1]))
    for key, value in environment(Path(sys.argv[1])).items():
        print(f"export {key}={value}")
