"""`graphopt explain`."""

from __future__ import annotations

from pathlib import Path

import click

from graphopt.cli._common import MODEL, console, json_option, write_json
from graphopt.errors import InputError


@click.command(no_args_is_help=True)
@click.argument("model", type=MODEL)
@click.argument("node")
@click.option("--report", type=MODEL, metavar="FILE", help="What `optimize --report FILE` wrote.")
@json_option
def explain(model: Path, node: str, report: Path | None, json_to: str | None) -> None:
    """Tell where a node came from, or what became of it.

    NODE is the name of a node, or of a tensor that it makes. Sources are known from the metadata
    that `optimize --lineage` writes, the rewrites from its report.

    \b
    graphopt optimize model.onnx -o small.onnx --lineage --report run.json
    graphopt explain small.onnx /layer1/Conv --report run.json
    """
    from graphopt import explanation
    from graphopt.report import Report

    known = None
    if report is not None:
        try:
            known = Report.from_json(report.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{report}: not what `optimize --report` writes ({error})") from None
    found = explanation.explain(model, node, known)
    if json_to:
        write_json(found.to_dict(), json_to)
    if json_to != "-":
        out = console()
        for line in found.lines():
            out.print(line)
