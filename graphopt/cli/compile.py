"""`graphopt compile` and `graphopt run`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from graphopt.cli._common import MODEL, console, json_option, limits, progress, setting, write_json
from graphopt.errors import InputError


@click.command("compile", no_args_is_help=True)
@click.argument("model", type=MODEL)
@click.option("--target", default="cpu", show_default=True, help="See `graphopt targets`.")
@click.option("--backend", help="By default the first that can compile for the target.")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="The folder to make."
)
@click.option(
    "-O",
    "level",
    type=click.IntRange(0, 3),
    default=2,
    show_default=True,
    metavar="N",
    help="How much to optimize first; see `graphopt optimize --help`.",
)
@click.option("-p", "--passes", metavar="PIPELINE", help="Pipeline text or a TOML file.")
@click.option(
    "--option",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="Of the backend, such as threads=2 or format=ort (repeatable).",
)
@click.option(
    "--verify",
    type=click.Choice(["off", "end", "each"]),
    default="end",
    show_default=True,
    help="Of the passes that run first.",
)
@click.option("--overwrite", is_flag=True, help="Replace an artifact that is there.")
@click.option("-q", "--quiet", is_flag=True)
@click.option("--time-limit", type=click.FloatRange(min=0), metavar="SECONDS")
def compile_command(model: Path, **options: Any) -> None:
    """Compile MODEL into a folder that runs without it.

    \b
    graphopt compile model.onnx --target cpu -o model.d
    graphopt compile model.onnx -o model.d --option format=ort --option threads=2
    """
    from graphopt import compilation

    with limits(options["time_limit"], None), progress(options["quiet"]) as show:
        show("compiling")
        folder = compilation.compile(
            model,
            options["target"],
            options["output"],
            backend=options["backend"],
            options=dict(map(setting, options["settings"])),
            level=options["level"],
            passes=options["passes"],
            verify=options["verify"],
            overwrite=options["overwrite"],
        )
    if not options["quiet"]:
        console().print(f"{folder}: compiled for {options['target']}; run it with `graphopt run`")


@click.command(no_args_is_help=True)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--inputs", required=True, type=MODEL, help="An .npz with one array per input.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="An .npz for the outputs.")
@click.option("--trust", is_flag=True, help="Load machine code from FOLDER.")
@click.option("--overwrite", is_flag=True, help="Replace the output where it exists.")
@json_option
def run(
    folder: Path,
    inputs: Path,
    output: Path | None,
    trust: bool,
    overwrite: bool,
    json_to: str | None,
) -> None:
    """Run what `graphopt compile` made.

    \b
    graphopt run model.d --inputs sample.npz -o result.npz
    """
    from graphopt import compilation, npz

    if output is not None and output.exists() and not overwrite:
        raise InputError(f"{output} exists; use --overwrite")
    executable = compilation.load(folder, trust=trust)
    results = executable.run(npz.read(inputs))
    if output is not None:
        npz.write(output, results)
    summary = [
        {
            "name": name,
            "dtype": str(getattr(value, "dtype", type(value).__name__)),
            "shape": list(getattr(value, "shape", ())),
        }
        for name, value in results.items()
    ]
    if json_to:
        write_json(summary, json_to)
    if json_to != "-":
        for row in summary:
            console().print(f"{row['name']}: {row['dtype']} {row['shape']}")
