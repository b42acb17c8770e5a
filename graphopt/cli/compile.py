"""`graphopt compile` and `graphopt run`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from graphopt.cli._common import (
    MODEL,
    Size,
    check_output,
    console,
    json_option,
    level_option,
    limits,
    progress,
    rpc_option,
    setting,
    verify_option,
    write_json,
)
from graphopt.cli._report import show_ops

if TYPE_CHECKING:
    from graphopt.report import Report


@click.command("compile", no_args_is_help=True)
@click.argument("model", type=MODEL)
@click.option("--target", default="cpu", show_default=True, help="See `graphopt targets`.")
@click.option(
    "--backend",
    help="By default the first that can compile for the target; `auto` takes the fastest.",
)
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="The folder to make."
)
@level_option("How much to optimize first; see `graphopt optimize --help`.")
@click.option("-p", "--passes", metavar="PIPELINE", help="Pipeline text or a TOML file.")
@click.option(
    "--option",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="Of the backend, such as threads=2 or format=ort (repeatable).",
)
@verify_option("Of the passes that run first.")
@click.option(
    "--shapes",
    multiple=True,
    metavar="NAME=MIN/USUAL/MAX",
    help="Sizes of an input to build for, such as x=1x3/4x3/8x3 (repeatable; TensorRT).",
)
@click.option(
    "--tune",
    type=click.FloatRange(min=0),
    default=0.0,
    metavar="MINUTES",
    help="Look for better options by measuring here.",
)
@click.option("--inputs", type=MODEL, help="An .npz to measure with, for `auto` and --tune.")
@click.option(
    "--fallback/--no-fallback",
    default=True,
    help="Whether ONNX Runtime may run what the backend does not take.",
)
@click.option("--cache/--no-cache", default=True, help="Whether to use and keep compiled models.")
@click.option("--overwrite", is_flag=True, help="Replace an artifact that is there.")
@json_option
@click.option("-q", "--quiet", is_flag=True)
@click.option("--time-limit", type=click.FloatRange(min=0), metavar="SECONDS")
@click.option("--memory-limit", type=Size(), metavar="SIZE", help="Such as 4G.")
def compile_command(model: Path, **options: Any) -> None:
    """Compile MODEL into a folder that runs without it.

    \b
    graphopt compile model.onnx --target cpu -o model.d
    graphopt compile model.onnx -o model.d --option format=ort --option threads=2
    graphopt compile model.onnx -o model.d --backend auto --tune 2
    graphopt compile model.onnx -o model.d --target cuda:sm_89 --backend tensorrt \\
        --shapes x=1x3x224x224/4x3x224x224/8x3x224x224
    """
    from graphopt import compilation, npz
    from graphopt.report import Report

    settings = dict(map(setting, options["settings"]))
    if options["shapes"]:
        settings["shapes"] = ",".join(options["shapes"])
    memory, report = options["memory_limit"], Report()
    with limits(options["time_limit"], memory), progress(options["quiet"]) as show:
        show("compiling")
        folder = compilation.compile(
            model,
            options["target"],
            options["output"],
            backend=options["backend"],
            options=settings,
            level=options["level"],
            passes=options["passes"],
            verify=options["verify"],
            overwrite=options["overwrite"],
            fallback=options["fallback"],
            cache=options["cache"],
            memory_limit=memory,
            tune=options["tune"],
            feeds=None if options["inputs"] is None else npz.read(options["inputs"]),
            progress=lambda done, what: show(f"{100 * done:.0f} % {what}"),
            report=report,
        )
    _tell(folder, options, report)


def _tell(folder: Path, options: Mapping[str, Any], report: Report) -> None:
    """Say what was made, and what of it is not the backend's."""
    from graphopt import artifact

    manifest = artifact.read(folder)
    if options["json_to"]:
        data = {"folder": str(folder), "manifest": manifest.to_dict(), "report": report.to_dict()}
        write_json(data, options["json_to"])
    if options["quiet"] or options["json_to"] == "-":
        return
    out = console()
    out.print(
        f"{folder}: compiled for {manifest.target.name} with {manifest.backend}; "
        "run it with `graphopt run`"
    )
    for note in report.notes:
        out.print(f"note: {note}")


@click.command(no_args_is_help=True)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--inputs", required=True, type=MODEL, help="An .npz with one array per input.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="An .npz for the outputs.")
@click.option("--trust", is_flag=True, help="Load machine code from FOLDER.")
@rpc_option
@click.option("--per-op", is_flag=True, help="Also show the time of each operator.")
@click.option("--overwrite", is_flag=True, help="Replace the output where it exists.")
@json_option
def run(
    folder: Path,
    inputs: Path,
    output: Path | None,
    trust: bool,
    device: str | None,
    per_op: bool,
    overwrite: bool,
    json_to: str | None,
) -> None:
    """Run what `graphopt compile` made.

    \b
    graphopt run model.d --inputs sample.npz -o result.npz
    graphopt run model.d --inputs sample.npz --per-op
    graphopt run model.d --inputs sample.npz --rpc localhost:9190
    """
    from graphopt import compilation, npz
    from graphopt.rpc import Remote

    if output is not None:
        check_output(output, overwrite)
    executable = Remote(folder, device) if device else compilation.load(folder, trust=trust)
    feeds = npz.read(inputs)
    results = executable.run(feeds)
    times = executable.profile(feeds) if per_op else ()
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
        rows = [dataclasses.asdict(op) for op in times]
        write_json({"outputs": summary, "ops": rows} if per_op else summary, json_to)
    if json_to != "-":
        for row in summary:
            console().print(f"{row['name']}: {row['dtype']} {row['shape']}")
        show_ops(console(), times)


@click.command("serve-rpc")
@click.option("--host", default="127.0.0.1", show_default=True, help="The interface to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=9190, show_default=True)
@click.option("--remote", is_flag=True, help="Permit an interface that other machines reach.")
def serve_rpc(host: str, port: int, remote: bool) -> None:
    """Run artifacts for `graphopt run --rpc` and `graphopt bench --rpc` elsewhere.

    Who has the token may run machine code here. It is that of the variable GRAPHOPT_RPC_TOKEN, or a
    new one. Nothing is encrypted: tunnel to it, as with `ssh -L 9190:localhost:9190 device`.

    \b
    graphopt serve-rpc
    GRAPHOPT_RPC_TOKEN=... graphopt serve-rpc --host 192.168.1.7 --remote
    """
    import secrets

    from graphopt import rpc

    given = os.environ.get(rpc.TOKEN, "")
    token = given or secrets.token_hex(16)
    with rpc.server(host, port, token, remote=remote) as server:
        shown = "" if given else f"; clients need {rpc.TOKEN}={token}"
        click.echo(f"listening on {host}:{server.server_port}{shown}")
        server.serve_forever()
