"""What a measurement was taken on, and what a model costs a process that only runs it."""

from __future__ import annotations

import json
import os
import pickle
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphopt import __version__
from graphopt.errors import GraphoptError
from graphopt.target import cores, cpuinfo

_LOADS = 3
_CHILD = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from graphopt.machine import child
child(sys.argv[2], trust=sys.argv[3] == "trust")
"""


@dataclass(frozen=True)
class Machine:
    """Where and when a measurement was taken; what can change it is recorded with it."""

    cpu: str
    cores: int
    """Cores that this process may use."""
    load_average: float | None
    """Of the last minute, when the measurement began."""
    governor: str
    """Of the first core's frequency; empty where it cannot be read."""
    system: str
    python: str
    graphopt: str

    @classmethod
    def here(cls) -> Machine:
        """This machine, now."""
        info = cpuinfo()
        try:
            load: float | None = os.getloadavg()[0]
        except OSError:
            load = None
        return cls(
            cpu=info.get("model name") or platform.processor() or platform.machine(),
            cores=cores(),
            load_average=load,
            governor=_governor(),
            system=f"{platform.system()} {platform.release()} {platform.machine()}",
            python=platform.python_version(),
            graphopt=__version__,
        )

    @property
    def busy(self) -> bool:
        """True where half of the cores or more have had other work: latencies are uncertain."""
        return self.load_average is not None and 2 * self.load_average >= self.cores


@dataclass(frozen=True)
class ProcessCost:
    """What loading and first running a model costs a fresh process."""

    load_ms: float
    """Median of three loads in one process, hashes checked, libraries already imported."""
    first_run_ms: float
    peak_bytes: int
    """Highest resident memory of the process (VmHWM), interpreter and libraries included."""
    base_bytes: int
    """The same before the model was loaded."""


def process_cost(folder: Path, feeds: Mapping[str, Any], *, trust: bool = False) -> ProcessCost:
    """Load and run an artifact in a child process of its own.

    Raises:
        GraphoptError: the child failed; a crash of native code is told by its signal.
    """
    done = subprocess.run(
        [
            *(sys.executable, "-c", _CHILD, json.dumps(sys.path)),
            *(str(folder.absolute()), "trust" if trust else "distrust"),
        ],
        input=pickle.dumps(dict(feeds)),  # between two processes of ours: never a file
        capture_output=True,
        check=False,
    )
    if done.returncode < 0:
        raise GraphoptError(f"{folder}: running it crashed with signal {-done.returncode}")
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    if done.returncode:
        raise GraphoptError(lines[-1] if lines else f"{folder}: exit code {done.returncode}")
    return ProcessCost(**json.loads(done.stdout.splitlines()[-1]))


def child(folder: str, *, trust: bool) -> None:
    """The child's side of `process_cost`: feeds come on stdin, the costs go to stdout."""
    from graphopt import artifact, backends, compilation

    feeds = pickle.loads(sys.stdin.buffer.read())
    try:
        backends.get(artifact.read(Path(folder)).backend).is_available()  # imports its library
        base = peak_memory()
        loads: list[float] = []
        start = time.perf_counter()
        model = compilation.load(folder, trust=trust)
        loads.append(time.perf_counter() - start)
        start = time.perf_counter()
        model.run(feeds)
        first = time.perf_counter() - start
        peak = peak_memory()
        del model
        for _ in range(_LOADS - 1):
            start = time.perf_counter()
            compilation.load(folder, trust=trust)
            loads.append(time.perf_counter() - start)
    except GraphoptError as error:
        sys.exit(str(error))
    cost = ProcessCost(statistics.median(loads) * 1e3, first * 1e3, peak, base)
    sys.stdout.write(json.dumps(vars(cost)))


def peak_memory() -> int:
    """Highest resident memory of this process so far, in bytes."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource  # not on Windows; counts bytes on macOS, where /proc is absent

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _governor() -> str:
    try:
        path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
        return path.read_text().strip()
    except OSError:
        return ""
