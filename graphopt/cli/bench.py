"""`graphopt bench`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from graphopt.cli._common import MODEL, console, json_option, limits, progress, setting, write_json

if TYPE_CHECKING:
    from rich.console import Console

    from graphopt.measurement import Measurement


@click.command(no_args_is_help=True)
@click.argument("models", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--inputs",
    type=MODEL,
    help="An .npz with one array per input; with `labels`, samples to score too.",
)
@click.option("--seed", default=0, show_default=True, help="Of random inputs.")
@click.option(
    "--dim",
    "bindings",
    multiple=True,
    metavar="NAME=SIZE",
    help="Size of a dynamic dimension of random inputs (repeatable).",
)
@click.option("--target", default="cpu", show_default=True)
@click.option("--backend", help="By default the first that runs the target.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option(
    "--option",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="Of the backend, such as graph_level=basic (repeatable).",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0),
    default=3.0,
    show_default=True,
    help="At least, for each model.",
)
@click.option(
    "--runs",
    type=click.IntRange(1),
    default=50,
    show_default=True,
    help="At least, for each model.",
)
@click.option(
    "--warmup",
    type=click.FloatRange(min=0),
    default=0.2,
    show_default=True,
    help="Seconds, and at least 10 runs.",
)
@click.option("--per-op", is_flag=True, help="Also the time of each operator.")
@click.option("--trust", is_flag=True, help="Load machine code from artifact folders.")
@json_option
@click.option("-q", "--quiet", is_flag=True)
@click.option("--time-limit", type=click.FloatRange(min=0), metavar="SECONDS")
def bench(models: Sequence[Path], **options: Any) -> None:
    """Measure the latency of MODELS (ONNX files or compiled folders), taking turns.

    Ratios are of medians, to the first model, with a 95 % confidence interval.

    \b
    graphopt bench model.onnx
    graphopt bench model.onnx small.onnx --threads 2 --per-op
    graphopt bench model.onnx small.onnx --inputs samples.npz --json -
    """
    from graphopt import measurement, npz
    from graphopt.timing import Plan

    feeds = None if options["inputs"] is None else npz.read(options["inputs"])
    labels = None if feeds is None else feeds.pop("labels", None)
    with limits(options["time_limit"], None), progress(options["quiet"]) as show:
        result = measurement.measure(
            {_title(path, models): path for path in models},
            feeds,
            labels,
            target=options["target"],
            backend=options["backend"],
            options={"threads": options["threads"], **dict(map(setting, options["settings"]))},
            plan=Plan(options["warmup"], 10, options["seconds"], options["runs"]),
            per_op=options["per_op"],
            seed=options["seed"],
            bindings={k: int(v) for k, v in map(setting, options["bindings"])},
            trust=options["trust"],
            progress=lambda done, what: show(f"{100 * done:.0f} % {what}"),
        )
    if options["json_to"]:
        write_json(result.to_dict(), options["json_to"])
    if not options["quiet"] and options["json_to"] != "-":
        _show(console(), result)


def _title(path: Path, models: Sequence[Path]) -> str:
    """The file's name where that tells the models apart."""
    return path.name if [p.name for p in models].count(path.name) == 1 else str(path)


def _show(out: Console, result: Measurement) -> None:
    from rich import box
    from rich.table import Table

    from graphopt.cli._report import size

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model")
    for title in ("p50 ms", "p90", "p99", "mean", "runs/s", "ratio", "95 %", "load ms", "memory"):
        table.add_column(title, justify="right")
    for m in result.models:
        assert m.latency is not None
        t, r, p = m.latency, m.ratio, m.process
        table.add_row(
            m.name,
            *(f"{value:.4g}" for value in (t.p50_ms, t.p90_ms, t.p99_ms, t.mean_ms, t.throughput)),
            f"{r.value:.3f}" if r else "1",
            f"{r.low:.3f} to {r.high:.3f}" if r else "",
            f"{p.load_ms:.3g}" if p else "",
            size(p.peak_bytes) if p else "",
        )
    out.print(table)
    for m in result.models:
        if m.accuracy is not None:
            out.print(f"{m.name}: accuracy {100 * m.accuracy:.2f} %")
        if m.ops:
            out.print(f"\n{m.name}, microseconds per run:")
            for op in sorted(m.ops, key=lambda op: -op.microseconds)[:30]:
                out.print(f"  {op.microseconds:10.1f}  {op.op:24} {op.node}")
    machine = result.machine
    threads = result.options.get("threads", "")
    out.print(
        f"{machine.cpu}, {machine.cores} cores, threads {threads}, "
        f"{result.backend} {', '.join(result.versions.values())}; data {result.data}"
    )
    for note in result.notes:
        out.print(f"note: {note}")
