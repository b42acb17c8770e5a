"""`graphopt verify` and `graphopt diff`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from graphopt.cli._common import (
    MODEL,
    Size,
    check_output,
    console,
    json_option,
    limits,
    progress,
    write_json,
)
from graphopt.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from graphopt.quantizer.scoring import LayerPair
    from graphopt.report import Comparison


_LIMITS = ("min_sqnr", "min_agreement", "max_drop")


@click.command(no_args_is_help=True)
@click.argument("a", type=MODEL)
@click.argument("b", type=MODEL)
@click.option("--inputs", type=MODEL, help="An .npz with one array per input.")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the random inputs."
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    help="Largest relative difference; by default it follows from the outputs' types.",
)
@click.option(
    "--data",
    metavar="DATA",
    help="For lossy models: samples to compare on, an .npz, a folder, file.py:function.",
)
@click.option("--min-sqnr", type=float, metavar="DB", help="With --data: least signal to noise.")
@click.option(
    "--min-agreement",
    type=click.FloatRange(0, 1),
    metavar="SHARE",
    help="With --data: least share of equal answers (largest elements).",
)
@click.option(
    "--max-drop",
    type=click.FloatRange(min=0),
    metavar="SHARE",
    help="With --data that has labels: most that the accuracy may fall (0.01 is a point).",
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@json_option
@click.option("-q", "--quiet", is_flag=True, help="Print nothing; the exit code tells.")
@click.option("--time-limit", type=click.FloatRange(min=0), metavar="SECONDS")
@click.option(
    "--memory-limit",
    type=Size(),
    metavar="SIZE",
    help="Run only the parts that differ where a whole run would need more.",
)
def verify(a: Path, b: Path, **options: Any) -> None:
    """Compare what A and B compute; exit 1 where they differ.

    By default B has to be exact but for rounding. With --data it may be lossy, and has to keep the
    limits given.

    \b
    graphopt verify model.onnx small.onnx
    graphopt verify model.onnx small.onnx --inputs sample.npz --tolerance 0.05
    graphopt verify model.onnx int8.onnx --data samples.npz --min-sqnr 20 --min-agreement 0.97
    """
    limited = [name for name in _LIMITS if options[name] is not None]
    if limited and options["data"] is None:
        raise InputError(f"--{limited[0].replace('_', '-')} needs --data: samples to compare on")
    if options["data"] is not None and not limited:
        raise InputError("--data goes with a limit: --min-sqnr, --min-agreement or --max-drop")
    with limits(options["time_limit"], None), progress(options["quiet"]) as show:
        show("running both models")
        if limited:
            ok, data, lines = _within_limits(a, b, options)
        else:
            ok, data, lines = _exact(a, b, options)
    if options["json_to"]:
        write_json(data, options["json_to"])
    if not options["quiet"] and options["json_to"] != "-":
        out = console()
        for line in lines:
            out.print(line)
    if not ok:
        raise SystemExit(1)


def _exact(
    a: Path, b: Path, options: dict[str, Any]
) -> tuple[bool, dict[str, Any], Sequence[object]]:
    """Whether B computes what A does but for rounding; that as JSON; and what to print."""
    from graphopt import feeds, files, verification
    from graphopt.report import finite

    first, second = files.load(a), files.load(b)
    found = verification.compare(
        first,
        second,
        feeds=None if options["inputs"] is None else feeds.load_feeds(options["inputs"], first),
        seed=options["seed"],
        tolerance=options["tolerance"],
        memory_limit=options["memory_limit"],
        threads=options["threads"],
    )
    word = "agree" if found.ok else "DIFFER" if found.different else "COULD NOT BE COMPARED"
    notes = [*found.signature, *found.unchecked, *found.notes]
    lines = [_table(found), *notes, f"the models {word} ({found.how})"]
    return found.ok, finite(dataclasses.asdict(found)), lines


def _within_limits(
    a: Path, b: Path, options: dict[str, Any]
) -> tuple[bool, dict[str, Any], Sequence[object]]:
    """As `_exact`: whether B, which may be lossy, keeps the limits on samples."""
    from graphopt import files
    from graphopt.quantizer.scoring import score
    from graphopt.report import finite
    from graphopt.samples import open_samples
    from graphopt.verification import signature_breaks

    first, second = files.load(a), files.load(b)
    samples = open_samples(options["data"], first)
    breaks = signature_breaks(first, second)
    if breaks:
        return False, {"ok": False, "failed": breaks}, breaks
    found = score(first, second, samples, threads=options["threads"])
    drop = None if found.before is None or found.after is None else found.before - found.after
    sqnr = math.inf if found.sqnr_db is None else found.sqnr_db
    lines, failed = [f"{found.samples} samples: {samples.where}"], list[str]()
    for option, title, value, unit in (
        ("min_sqnr", "SQNR", sqnr, " dB"),
        ("min_agreement", "agreement", found.agreement, ""),
        ("max_drop", "drop of the accuracy", drop, ""),
    ):
        limit = options[option]
        if value is None:
            if limit is not None:
                why = "no labels" if option == "max_drop" else "no rows with a largest element"
                raise InputError(f"--{option.replace('_', '-')}: there are {why}")
            continue
        line = f"{title}: {value:.4g}{unit}"
        if limit is not None:
            least = option.startswith("min")
            kept = value >= limit if least else value <= limit + 1e-12
            failed += [] if kept else [option]
            line += (
                f", {'at least' if least else 'at most'} {limit:g}: {'ok' if kept else 'FAILED'}"
            )
        lines.append(line)
    data = {**dataclasses.asdict(found), "ok": not failed, "failed": failed}
    return not failed, finite(data), lines


def _table(verdict: Comparison) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("output", "max abs", "max rel", "limit", "cosine", "SQNR dB", "top-1", ""):
        table.add_column(title, justify="left" if title in ("output", "") else "right")
    for o in verdict.outputs:
        table.add_row(
            o.name,
            f"{o.max_abs:.2e}",
            f"{o.max_rel:.2e}",
            f"{o.tolerance:.0e}",
            "" if o.cosine is None else f"{o.cosine:.6f}",
            "" if o.sqnr_db is None else f"{o.sqnr_db:.1f}",
            "" if o.top1 is None else f"{100 * o.top1:.1f} %",
            o.reason or o.note or ("ok" if o.ok else "DIFFERS"),
        )
    return table


@click.command(no_args_is_help=True)
@click.argument("a", type=MODEL)
@click.argument("b", type=MODEL)
@click.option("--layers", is_flag=True, help="Compare the values of each layer on samples.")
@click.option("--data", help="The samples, as for `quantize`.")
@click.option("--samples", "limit", type=click.IntRange(1), help="Use only the first so many.")
@click.option(
    "--reference",
    type=MODEL,
    help="The float model: how far A and B are from it, layer by layer, not from each other.",
)
@click.option(
    "--report",
    "page",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.html",
    help="A page with the layers drawn.",
)
@click.option("--overwrite", is_flag=True)
@json_option
def diff(a: Path, b: Path, json_to: str | None, **options: Any) -> None:
    """Show what changed from A to B, node by node.

    Nodes are matched by name, and by the lineage that `graphopt optimize --lineage` notes. With
    --layers two models, quantized ones for example, are compared by their values on samples.

    \b
    graphopt diff model.onnx small.onnx
    graphopt diff int8.onnx int16.onnx --layers --data samples.npz --reference model.onnx
    """
    from graphopt import differences, files

    if options["layers"]:
        _diff_layers(a, b, json_to, options)
        return
    for name in ("data", "limit", "reference", "page"):
        if options[name] is not None:
            raise InputError("samples, a reference and a report are for --layers")
    found = differences.diff(files.load(a), files.load(b))
    if json_to:
        write_json(found.to_dict(), json_to)
    if json_to != "-":
        out = console()
        for line in found.lines():
            out.print(line)


def _diff_layers(a: Path, b: Path, json_to: str | None, options: dict[str, Any]) -> None:
    from graphopt import files, plots
    from graphopt.quantizer.page import layers_page
    from graphopt.quantizer.scoring import compare_layers
    from graphopt.report import finite
    from graphopt.samples import open_samples

    if options["data"] is None:
        raise InputError("--layers needs samples: --data")
    page: Path | None = options["page"]
    if page is not None:
        check_output(page, options["overwrite"])
    loaded = [files.load(path) for path in (a, b)]
    if options["reference"] is not None:
        loaded.append(files.load(options["reference"]))
    samples = open_samples(options["data"], loaded[0], limit=options["limit"])
    found = compare_layers(loaded[0], loaded[1], samples, *loaded[2:])
    if not found:
        raise InputError(f"{a} and {b} have no float tensors of the same names")
    if page is not None:
        plots.write(page, layers_page(str(a), str(b), found))
    if json_to:
        write_json(finite([dataclasses.asdict(layer) for layer in found]), json_to)
    if json_to != "-":
        _show_layers(found)


def _show_layers(found: Sequence[LayerPair]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    both = any(layer.other_db is not None for layer in found)
    for title in ("SQNR dB", *(["of B", "gain"] if both else []), "operator", "tensor"):
        table.add_column(title, justify="right" if title != "tensor" else "left")
    for layer in found:
        figures = [_decibels(layer.sqnr_db)]
        if both:
            gain = (layer.other_db or 0.0) - (layer.sqnr_db or 0.0)
            known = layer.other_db is not None and layer.sqnr_db is not None
            figures += [_decibels(layer.other_db), f"{gain:+.1f}" if known else ""]
        table.add_row(*figures, layer.op, layer.name)
    console().print(table)


def _decibels(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f}"
