"""`graphopt bench`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from graphopt.cli._common import (
    MODEL,
    console,
    json_option,
    limits,
    progress,
    rpc_option,
    setting,
    write_json,
)
from graphopt.errors import GateError, InputError

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
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of random inputs."
)
@click.option(
    "--dim",
    "bindings",
    multiple=True,
    metavar="NAME=SIZE",
    help="Size of a dynamic dimension of random inputs (repeatable).",
)
@click.option("--target", default="cpu", show_default=True)
@click.option("--backend", help="By default the first that runs the target.")
@click.option(
    "--backends",
    metavar="NAME,NAME",
    help="Each model with each of them, in processes of their own; `all` are those usable here.",
)
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
@click.option(
    "--max-ratio",
    type=click.FloatRange(min=0),
    metavar="R",
    help="Exit 1 where a model's ratio is above R, the whole interval of it.",
)
@click.option("--per-op", is_flag=True, help="Also the time of each operator.")
@click.option("--trust", is_flag=True, help="Load machine code from artifact folders.")
@rpc_option
@json_option
@click.option("-q", "--quiet", is_flag=True)
@click.option("--time-limit", type=click.FloatRange(min=0), metavar="SECONDS")
def bench(models: Sequence[Path], **options: Any) -> None:
    """Measure the latency of MODELS, taking turns.

    MODELS are ONNX files or compiled folders. Ratios are of medians, to the first model, with a
    95 % confidence interval.

    \b
    graphopt bench model.onnx
    graphopt bench model.onnx small.onnx --threads 2 --per-op
    graphopt bench model.onnx --backends ort,tvm
    graphopt bench model.onnx --target arm64 --rpc localhost:9190
    graphopt bench model.onnx small.onnx --inputs samples.npz --json -
    graphopt bench model.onnx small.onnx --max-ratio 1.02
    """
    from graphopt import measurement, npz
    from graphopt.timing import Plan

    if options["max_ratio"] is not None and len(models) < 2 and options["backends"] is None:
        raise InputError("--max-ratio compares with the first model: give another one")
    feeds = None if options["inputs"] is None else npz.read(options["inputs"])
    labels = None if feeds is None else feeds.pop("labels", None)
    with limits(options["time_limit"], None), progress(options["quiet"]) as show:
        result = measurement.measure(
            _titles(models),
            feeds,
            labels,
            target=options["target"],
            backend=_backends(options),
            options={"threads": options["threads"], **dict(map(setting, options["settings"]))},
            plan=Plan(options["warmup"], 10, options["seconds"], options["runs"]),
            per_op=options["per_op"],
            seed=options["seed"],
            bindings=dict(map(_dimension, options["bindings"])),
            trust=options["trust"],
            device=options["device"],
            progress=lambda done, what: show(f"{100 * done:.0f} % {what}"),
        )
    if options["json_to"]:
        write_json(result.to_dict(), options["json_to"])
    if not options["quiet"] and options["json_to"] != "-":
        _show(console(), result)
    limit = options["max_ratio"]
    slow = [m for m in result.models if limit is not None and m.ratio and m.ratio.low > limit]
    if slow:
        ratios = ", ".join(f"{m.name} {m.ratio.value:.3f}" for m in slow if m.ratio)
        raise GateError(f"slower than {limit:g} times {result.models[0].name}: {ratios}")


def _backends(options: Mapping[str, Any]) -> str | list[str] | None:
    """The backend or backends that were asked for."""
    if options["backends"] is None or options["backend"] is not None:
        if options["backends"] is not None:
            raise InputError("give --backend or --backends, not both")
        backend: str | None = options["backend"]
        return backend
    if options["backends"] != "all":
        return [name for name in options["backends"].split(",") if name]
    from graphopt import backends
    from graphopt.target import Target

    target = Target.parse(options["target"])
    every = map(backends.get, backends.names())
    there = options["device"] is not None
    return [
        each.name
        for each in every
        if each.can_compile(target) is None and (there or each.can_run(target) is None)
    ]


def _titles(models: Sequence[Path]) -> dict[str, Path]:
    """The models by file name where that tells them apart, by path and number otherwise."""
    names = [path.name for path in models]
    titles: dict[str, Path] = {}
    for path in models:
        title = path.name if names.count(path.name) == 1 else str(path)
        again = list(titles.values()).count(path)
        titles[f"{title} #{again + 1}" if again else title] = path
    return titles


def _dimension(text: str) -> tuple[str, int]:
    name, size = setting(text)
    if not size.isdecimal():
        raise InputError(f"--dim {text}: the size of a dimension is a number")
    return name, int(size)


def _show(out: Console, result: Measurement) -> None:
    from rich import box
    from rich.table import Table

    from graphopt.cli._report import show_ops, size

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    rows: dict[str, list[str]] = {}
    for m in result.models:
        table.add_column(m.name, justify="right", overflow="fold")
        assert m.latency is not None
        t, r, p = m.latency, m.ratio, m.process
        for title, text in (
            ("p50 ms", f"{t.p50_ms:.4g}"),
            ("p90 ms", f"{t.p90_ms:.4g}"),
            ("p99 ms", f"{t.p99_ms:.4g}"),
            ("mean ms", f"{t.mean_ms:.4g}"),
            ("runs", str(t.runs)),
            ("runs/s", f"{t.throughput:.0f}" if t.throughput >= 100 else f"{t.throughput:.3g}"),
            ("load ms", f"{p.load_ms:.3g}" if p else ""),
            ("memory", size(p.peak_bytes) if p else ""),
            ("accuracy", "" if m.accuracy is None else f"{100 * m.accuracy:.2f} %"),
            ("ratio", f"{r.value:.3f}" if r else "1"),
            ("95 %", f"{r.low:.3f} to {r.high:.3f}" if r else ""),
        ):
            rows.setdefault(title, []).append(text)
    for title, texts in rows.items():
        if any(texts):
            table.add_row(title, *texts)
    out.print(table)
    for m in result.models:
        if m.ops:
            out.print(f"\n{m.name}")
            show_ops(out, m.ops)
    machine = result.machine
    threads = result.options.get("threads", "")
    out.print(
        f"{machine.cpu}, {machine.cores} cores, threads {threads}, "
        f"{', '.join(' '.join(pair) for pair in result.versions.items())}; data {result.data}"
    )
    for note in result.notes:
        out.print(f"note: {note}")
