"""The project's own figures, in one table.

    python -m tests.benchmarks.run [--only SECTION ...] [--json FILE] [--keep FOLDER]

Sections: start (imports and small runs), bert, llama, streaming, chain, large, repeat (second
runs), latency.
Each line has the figure, the bar that it has to stay below, and whether it does; the exit code is
1 where one does not. CPU seconds are user and system time, of a whole process where it says so. A
model that is costly to make is kept in FOLDER for the next run. BERT, Llama and the streaming model
need torch, here or in the interpreter that --torch names; the extra models are found as the tests
find them.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from graphopt.timing import Ratio
from tests._shared import shared
from tests.benchmarks import chain, large

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
_LLAMA = 814  # 55 % of what onnxsim 0.8.1 leaves
_STREAMING = 300  # what onnxslim leaves, the best of its peers
_POLL = 0.01
_SLOWER = 1.02
_IMPORT = "from graphopt import load, optimize, save"
_ALONE = """
import json, sys, time
from graphopt import load, optimize
from graphopt.report import Stats
model = load(sys.argv[1])
options = {"verify": "off", "level": int(sys.argv[3])}
optimize(model, **options)  # imports and caches
best = []
for _ in range(int(sys.argv[2])):
    start = time.process_time()
    result = optimize(model, **options)
    best.append(time.process_time() - start)
print(json.dumps([sorted(best), Stats.of(model).nodes, Stats.of(result).nodes]))
"""


@dataclass(frozen=True)
class Line:
    """One figure."""

    what: str
    value: float
    unit: str = ""
    bar: float | None = None
    """The most that it may be."""
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the bar is kept."""
        return self.bar is None or self.value <= self.bar


@dataclass(frozen=True)
class Cost:
    """Of a process: CPU seconds, and the most memory that no file backs, in MB."""

    cpu: float
    private: float
    output: str


@dataclass(frozen=True)
class Setting:
    """Where models are kept, and with what they are made."""

    folder: Path
    torch: str
    names: Sequence[str] = ()
    """Of the models that repeat and latency take; all where there are none."""
    target: str = "portable"
    """What the models of latency are optimized for."""


def process(command: Sequence[str]) -> Cost:
    """Run a command to its end. Raises SystemExit, with what it said last, where it fails."""
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT, cwd=ROOT)
        private = 0.0
        while True:
            private = max(private, _private(child.pid))
            done, status, usage = os.wait4(child.pid, os.WNOHANG)
            if done:
                break
            time.sleep(_POLL)
        child.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        output = log.read().decode(errors="replace")
    if child.returncode:
        said = output.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
        raise SystemExit(f"{' '.join(map(str, command))[-200:]}: {said[0]}")
    return Cost(usage.ru_utime + usage.ru_stime, private, output)


def _private(pid: int) -> float:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return 0.0


def graphopt(*arguments: str | Path) -> list[str]:
    """The command line of this checkout."""
    return [sys.executable, "-m", "graphopt", *map(str, arguments)]


def alone(path: Path, runs: int, level: int = 2) -> tuple[float, int, int]:
    """CPU seconds of `optimize` alone (median), nodes before and after."""
    cost = process([sys.executable, "-c", _ALONE, str(path), str(runs), str(level)])
    seconds, before, after = json.loads(cost.output.splitlines()[-1])
    return statistics.median(seconds), before, after


def start(setting: Setting) -> Iterator[Line]:
    """Imports, help, and a whole run on a small model."""
    small, out = ROOT / "models" / "digits_cnn.onnx", setting.folder / "small.onnx"
    optimize = graphopt("optimize", small, "-o", out, "--overwrite", "-q")
    for what, command, bar in (
        ("import graphopt", [sys.executable, "-c", "import graphopt"], 0.5),
        ("from graphopt import optimize", [sys.executable, "-c", _IMPORT], 0.5),
        ("graphopt --help", graphopt("--help"), 0.35),
        ("optimize a small model, whole process", optimize, 1.0),
        ("the same with --verify off", [*optimize, "--verify", "off"], None),
    ):
        process(command)  # compiles byte code, fills the disk cache
        seconds = statistics.median(process(command).cpu for _ in range(5))
        yield Line(what, seconds, "CPU-s", bar)


def bert(setting: Setting) -> Iterator[Line]:
    """24 layers, dynamic, from torch's legacy exporter."""
    path = _exported(setting, "bert")
    if path is None:
        return
    seconds, before, after = alone(path, 5)
    yield Line("BERT, optimizer alone", seconds, "CPU-s", 1.0)
    yield Line("BERT, nodes left", after, f"of {before}", 800)
    after = alone(path, 1, level=3)[2]
    yield Line("BERT, nodes left with opset 23", after, f"of {before}", 480)


def llama(setting: Setting) -> Iterator[Line]:
    """24 layers with a cache of keys and values, from torch's legacy exporter."""
    path = _exported(setting, "llama")
    if path is None:
        return
    seconds, before, after = alone(path, 3, level=3)
    yield Line("Llama, optimizer alone, opset 23", seconds, "CPU-s")
    yield Line("Llama, nodes left with opset 23", after, f"of {before}", _LLAMA)


def streaming(setting: Setting) -> Iterator[Line]:
    """A net of many tiny operators, frame by frame, and what a frame costs."""
    path = _exported(setting, "streaming")
    if path is None:
        return
    _, before, after = alone(path, 1)
    yield Line("streaming, nodes left", after, f"of {before}", _STREAMING)
    ratio = _ratio(path, setting, None)
    yield Line("streaming, latency", ratio.value, "", 0.85, _certain(ratio))


def _exported(setting: Setting, name: str) -> Path | None:
    """A model that torch writes; None, and why, where it is not there."""
    path = setting.folder / f"{name}.onnx"
    if not path.exists():
        try:
            process([setting.torch, "-m", f"tests.benchmarks.{name}", str(path)])
        except (SystemExit, OSError) as error:
            print(f"{name} skipped: {error}")
            return None
    return path


def growth(setting: Setting) -> Iterator[Line]:
    """Cost per node at 100,000 nodes over that at 1,000."""
    costs: list[float] = []
    for nodes, runs in ((1_000, 9), (100_000, 1)):
        path = setting.folder / f"chain{nodes}.onnx"
        if not path.exists():
            path.write_bytes(chain.chain(nodes).SerializeToString())
        seconds, before, after = alone(path, runs)
        costs.append(seconds / before)
        yield Line(f"chain of {before:,} nodes, per node", 1e6 * costs[-1], "CPU-us")
        yield Line(f"chain of {before:,} nodes, left", after, f"of {before}")
    yield Line("cost per node, large over small", costs[1] / costs[0], "", 1.3)


def beyond(setting: Setting) -> Iterator[Line]:
    """A model of 2.5 GB: load, optimize and save, without verification."""
    path, out = setting.folder / "large.onnx", setting.folder / "large_out.onnx"
    if not path.exists():
        large.write(path)
    tiny = setting.folder / "tiny.onnx"
    large.write(tiny, layers=1)
    costs: list[Cost] = []
    for each in (tiny, path):
        command = graphopt("optimize", each, "-o", out, "--overwrite", "-q", "--verify", "off")
        process(command)  # byte code and page cache
        runs = sorted((process(command) for _ in range(3)), key=lambda cost: cost.cpu)
        costs.append(runs[1])
    for file in setting.folder.glob("large_out.onnx*"):
        file.unlink()
    yield Line("2.5 GB model, whole process", costs[1].cpu, "CPU-s", 2.5)
    yield Line("2.5 GB model, private memory", costs[1].private, "MB")
    beyond_tiny = costs[1].private - costs[0].private
    yield Line("the same beyond a run with one layer", beyond_tiny, "MB", 100)


def models(setting: Setting) -> list[Path]:
    """The shipped models, those that were made here, and the corpus where it is present."""
    paths = [*sorted((ROOT / "models").glob("*.onnx")), *setting.folder.glob("bert.onnx")]
    try:
        paths += sorted(shared("corpus").glob("models/*/model.onnx"))
    except pytest.skip.Exception as absent:
        print(f"shipped models only: {absent}")
    return [path for path in paths if not setting.names or _title(path) in setting.names]


def _title(path: Path) -> str:
    return path.parent.name if path.name == "model.onnx" else path.stem


def repeat(setting: Setting) -> Iterator[Line]:
    """Optimizing a result again changes no byte."""
    differ: list[str] = []
    paths = models(setting)
    first, second = setting.folder / "first.onnx", setting.folder / "second.onnx"
    for path in paths:
        digests: list[str] = []
        for source, target in ((path, first), (first, second)):
            process(
                graphopt("optimize", source, "-o", target, "--overwrite", "-q", "--verify", "off")
            )
            digests.append(hashlib.sha256(target.read_bytes()).hexdigest())
        if digests[0] != digests[1]:
            differ.append(_title(path))
    yield Line("second runs that differ", len(differ), f"of {len(paths)}", 0, ", ".join(differ))


def latency(setting: Setting) -> Iterator[Line]:
    """Results against originals under ONNX Runtime's full optimization, interleaved."""
    ratios: dict[str, float] = {}
    surely: list[str] = []
    for path in models(setting):
        data = path.with_name("inputs.npz")
        ratio = _ratio(path, setting, data if data.exists() else None)
        ratios[_title(path)] = ratio.value
        if ratio.low > _SLOWER:
            surely.append(_title(path))
        yield Line(f"latency of {_title(path)}", ratio.value, note=_certain(ratio))
    slower = [name for name, value in ratios.items() if value > _SLOWER]
    yield Line("latency, geometric mean", statistics.geometric_mean(ratios.values()), "", 1.0)
    yield Line(f"results beyond {_SLOWER}", len(slower), note=", ".join(slower))
    yield Line("the same with 95 % confidence", len(surely), "", 0, ", ".join(surely))


def _ratio(path: Path, setting: Setting, data: Path | None) -> Ratio:
    """Time of what is left of a model over its own."""
    import graphopt as package
    from graphopt.feeds import load_feeds
    from graphopt.timing import Plan

    out = setting.folder / "fast.onnx"
    small = package.optimize(path, verify="off", target=setting.target)
    package.save(small, out, overwrite=True)
    feeds = None if data is None else load_feeds(data, package.load(path))
    pair = {"original": path, "optimized": out}
    measured = package.measure(pair, feeds, plan=Plan(seconds=1.0), process=False)
    ratio = measured.models[1].ratio
    assert ratio is not None
    return ratio


def _certain(ratio: Ratio) -> str:
    return f"95 % between {ratio.low:.3f} and {ratio.high:.3f}"


SECTIONS: dict[str, Callable[[Setting], Iterator[Line]]] = {
    "start": start,
    "bert": bert,
    "llama": llama,
    "streaming": streaming,
    "chain": growth,
    "large": beyond,
    "repeat": repeat,
    "latency": latency,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--keep", type=Path, metavar="FOLDER")
    parser.add_argument("--torch", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--models", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--target", default="portable", help="of latency: cpu for this machine's")
    options = parser.parse_args()
    lines: list[Line] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder: Path = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        setting = Setting(folder.absolute(), options.torch, options.models, options.target)
        for name in options.only:
            for line in SECTIONS[name](setting):
                lines.append(line)
                bar = "" if line.bar is None else f"at most {line.bar:g}"
                word = "" if line.bar is None else "ok" if line.ok else "MISSED"
                print(
                    f"{line.what:46} {line.value:>10.3f} {line.unit:12} {bar:14} {word:7}"
                    f"{line.note}",
                    flush=True,
                )
    if options.json is not None:
        data = [{**dataclasses.asdict(line), "ok": line.ok} for line in lines]
        options.json.write_text(json.dumps(data, indent=2))
    raise SystemExit(not all(line.ok for line in lines))


if __name__ == "__main__":
    main()
