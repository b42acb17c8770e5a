"""`graphopt verify` and `graphopt diff`."""

from __future__ import annotations

from pathlib import Path

import click

from graphopt.cli._common import MODEL, Size, console, json_option, limits, progress, write_json


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
def verify(
    a: Path,
    b: Path,
    inputs: Path | None,
    seed: int,
    tolerance: float | None,
    threads: int,
    json_to: str | None,
    quiet: bool,
    time_limit: float | None,
    memory_limit: int | None,
) -> None:
    """Compare what A and B compute; exit 1 where they differ.

    \b
    graphopt verify model.onnx small.onnx
    graphopt verify model.onnx int8.onnx --inputs sample.npz --tolerance 0.05
    """
    import dataclasses

    from graphopt import feeds, files, verification
    from graphopt.report import finite

    with limits(time_limit, None), progress(quiet) as show:
        first, second = files.load(a), files.load(b)
        given = None if inputs is None else feeds.load_feeds(inputs, first)
        show("running both models")
        verdict = verification.compare(
            first,
            second,
            feeds=given,
            seed=seed,
            tolerance=tolerance,
            memory_limit=memory_limit,
            threads=threads,
        )
    if json_to:
        write_json(finite(dataclasses.asdict(verdict)), json_to)
    if not quiet and json_to != "-":
        _show(verdict)
    if not verdict.ok:
        raise SystemExit(1)


def _show(verdict: object) -> None:
    from rich import box
    from rich.table import Table

    from graphopt.report import Comparison

    assert isinstance(verdict, Comparison)
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
    out = console()
    out.print(table)
    for line in (*verdict.signature, *verdict.unchecked, *verdict.notes):
        out.print(line)
    word = "agree" if verdict.ok else "DIFFER" if verdict.different else "COULD NOT BE COMPARED"
    out.print(f"the models {word} ({verdict.how})")


@click.command(no_args_is_help=True)
@click.argument("a", type=MODEL)
@click.argument("b", type=MODEL)
@json_option
def diff(a: Path, b: Path, json_to: str | None) -> None:
    """Show what changed from A to B, node by node.

    Nodes are matched by name, and by the lineage that `graphopt optimize --lineage` notes.

    \b
    graphopt diff model.onnx small.onnx
    """
    from graphopt import differences, files

    found = differences.diff(files.load(a), files.load(b))
    if json_to:
        write_json(found.to_dict(), json_to)
    if json_to != "-":
        out = console()
        for line in found.lines():
            out.print(line)
