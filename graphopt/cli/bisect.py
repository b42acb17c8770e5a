"""`graphopt bisect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from graphopt.cli._common import (
    MODEL,
    console,
    json_option,
    level_option,
    limits,
    progress,
    write_json,
)


@click.command(no_args_is_help=True)
@click.argument("model", type=MODEL)
@level_option()
@click.option("-p", "--passes", metavar="PIPELINE", help="Pipeline text or a TOML file.")
@click.option("--target", default="portable", show_default=True)
@click.option("--inputs", type=MODEL, help="An .npz with one array per input.")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the random inputs."
)
@click.option("--tolerance", type=click.FloatRange(min=0), help="Largest relative difference.")
@json_option
@click.option("--time-limit", type=click.FloatRange(min=0), metavar="SECONDS")
def bisect(model: Path, json_to: str | None, time_limit: float | None, **options: Any) -> None:
    """Find the first pass, and the rewrite, that breaks MODEL.

    The exit code is 1 where there is one.

    \b
    graphopt bisect model.onnx
    graphopt bisect model.onnx -p 'fold-constants,fuse-layernorm' --inputs sample.npz
    """
    from graphopt import bisection, feeds, files

    with limits(time_limit, None), progress(json_to == "-") as show:
        source = files.load(model)
        given = options.pop("inputs")
        found = bisection.bisect(
            source,
            inputs=None if given is None else feeds.load_feeds(given, source),
            progress=show,
            **options,
        )
    if json_to:
        write_json(found.to_dict(), json_to)
    if json_to != "-":
        console().print(str(found))
    if found.culprit is not None:
        raise SystemExit(1)
