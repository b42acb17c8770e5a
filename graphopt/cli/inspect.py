"""`graphopt inspect`."""

from __future__ import annotations

from pathlib import Path

import click

from graphopt.cli._common import MODEL, console, json_option, write_json


@click.command(no_args_is_help=True)
@click.argument("model", type=MODEL)
@click.option("--nodes", is_flag=True, help="Also a line for each node.")
@json_option
def inspect(model: Path, nodes: bool, json_to: str | None) -> None:
    """Tell what is in MODEL, and what a run of it costs.

    Signature, operators, parameters, FLOPs, and the peak memory of activations.

    \b
    graphopt inspect model.onnx
    graphopt inspect model.onnx --nodes --json -
    """
    from graphopt import files, inspection

    found = inspection.inspect(files.load(model))
    if json_to:
        write_json(found.to_dict(), json_to)
    if json_to != "-":
        out = console()
        for line in found.lines(nodes=nodes):
            out.print(line)
