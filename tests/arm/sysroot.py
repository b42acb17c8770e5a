"""Set up what it takes to run Python for ARM on this machine, in a folder of its own.

    python tests/arm/sysroot.py [--tvm]     prints the folder; about 30 seconds, cached

Debian's arm64 packages of Python 3.11 are unpacked beside each other, wheels for aarch64 are put
next to them, and qemu's user-mode emulator is taken from its package unless it is installed. No
privileges are needed, and nothing outside of the folder is touched. Needs Debian or Ubuntu with
Python 3.11 among its packages, pip, and a network.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from graphopt import places

PACKAGES = (
    *("python3.11-minimal", "libpython3.11-stdlib", "libstdc++6", "libgcc-s1", "libc6"),
    "libgomp1",
)
WHEELS = ("onnxruntime", "numpy", "ml_dtypes", "flatbuffers", "packaging", "protobuf")
TVM_WHEELS = ("apache-tvm", "apache-tvm-ffi", "typing_extensions", "psutil", "cloudpickle")
PLATFORMS = (
    *(f"manylinux_2_{minor}_aarch64" for minor in (28, 27, 26, 24, 17)),
    "manylinux2014_aarch64",
)
# ONNX Runtime parses it when it is loaded, and crashes on that of an x86 machine
CPUINFO = """processor\t: 0
BogoMIPS\t: 100.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp asimdrdm asimddp i8mm
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1

"""
FOLDER = places.cache("arm64")


def python(folder: Path = FOLDER, cpu: str = "max") -> list[str]:
    """The command that runs Python for ARM; FileNotFoundError where nothing was set up.

    `cpu` is the one that is emulated; the default has every extension, SME too, for which ONNX
    Runtime has kernels of its own.
    """
    root = folder / "root"
    if not (folder / "ready.json").is_file():
        raise FileNotFoundError(f"no ARM system in {folder}: python tests/arm/sysroot.py")
    return [
        *(shutil.which("qemu-aarch64-static") or str(folder / "qemu-aarch64-static"),),
        *("-cpu", cpu, "-L", str(root)),
        *("-E", f"PYTHONHOME={root}/usr"),
        *("-E", f"PYTHONPATH={Path(__file__).resolve().parents[2]}:{root}/site"),
        *("-E", f"LD_LIBRARY_PATH={root}/usr/lib/aarch64-linux-gnu:{root}/lib/aarch64-linux-gnu"),
        *("-E", "PYTHONDONTWRITEBYTECODE=1"),
        *("-E", "OMP_NUM_THREADS=1"),
        f"{root}/usr/bin/python3.11",
    ]


def has_tvm(folder: Path = FOLDER) -> bool:
    """Whether TVM's wheels are there too."""
    ready = folder / "ready.json"
    return ready.is_file() and "apache-tvm" in json.loads(ready.read_text())


def set_up(folder: Path = FOLDER, *, tvm: bool = False) -> None:
    """Make the folder, unless it is there with the same versions.

    Raises:
        subprocess.CalledProcessError: a package cannot be had.
    """
    wanted = _versions(tvm)
    ready = folder / "ready.json"
    if ready.is_file() and wanted.items() <= json.loads(ready.read_text()).items():
        return
    shutil.rmtree(folder, ignore_errors=True)
    root = folder / "root"
    root.mkdir(parents=True)
    for package in _download(folder / "arm64", "arm64", PACKAGES):
        _run("dpkg", "-x", str(package), str(root))
    if shutil.which("qemu-aarch64-static") is None:
        (package,) = _download(folder / "qemu", "", ("qemu-user-static",), alone=True)
        _run("dpkg", "-x", str(package), str(folder / "qemu"))
        found = folder / "qemu" / "usr" / "bin" / "qemu-aarch64-static"
        shutil.move(found, folder / "qemu-aarch64-static")
    wheels = [f"{name}=={version}" if version else name for name, version in wanted.items()]
    _run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
        *("--no-deps", "--target", str(root / "site"), "--only-binary=:all:"),
        *("--python-version", "3.11", "--implementation", "cp"),
        *("--abi", "cp311", "--abi", "abi3", "--abi", "none"),
        *(argument for name in PLATFORMS for argument in ("--platform", name)),
        *wheels,
    )
    (root / "proc").mkdir()
    (root / "proc" / "cpuinfo").write_text(CPUINFO)
    (root / "sys" / "devices" / "system" / "cpu").mkdir(parents=True)
    for name in ("arm64", "qemu"):
        shutil.rmtree(folder / name, ignore_errors=True)
    subprocess.run([*_ready(folder, wanted), "-c", "import onnxruntime"], check=True)


def _ready(folder: Path, wanted: dict[str, str]) -> list[str]:
    (folder / "ready.json").write_text(json.dumps(wanted))
    return python(folder)


def _versions(tvm: bool) -> dict[str, str]:
    """The wheels to install with this environment's versions, those that pip may choose empty."""
    wanted: dict[str, str] = {}
    for name in (*WHEELS, *(TVM_WHEELS if tvm else ())):
        try:
            wanted[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            wanted[name] = ""
    return wanted


def _download(
    folder: Path, architecture: str, packages: Sequence[str], *, alone: bool = False
) -> list[Path]:
    """Packages with what they depend on (or `alone`), by apt with a state of its own."""
    for name in ("lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    (folder / "status").touch()
    options = [
        f"-oDir::State::Lists={folder}/lists",
        f"-oDir::Cache={folder}/cache",
        f"-oDir::State::status={folder}/status",
        "-oDebug::NoLocking=1",
    ]
    if architecture:
        options += [f"-oAPT::Architecture={architecture}", f"-oAPT::Architectures={architecture}"]
    _run("apt-get", *options, "-qq", "update", cwd=folder)
    if alone:
        _run("apt-get", *options, "-qq", "download", *packages, cwd=folder)
        return sorted(folder.glob("*.deb"))
    _run(
        *("apt-get", *options, "-qq", "install", "-y", "--no-install-recommends"),
        *("--download-only", *packages),
        cwd=folder,
    )
    return sorted((folder / "cache" / "archives").glob("*.deb"))


def _run(*command: str, cwd: Path | None = None) -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(command, check=True, cwd=cwd, env=environment, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    if platform.machine().lower() in ("aarch64", "arm64"):
        sys.exit("this is an ARM machine: there is nothing to emulate")
    set_up(tvm="--tvm" in sys.argv)
    print(FOLDER)
