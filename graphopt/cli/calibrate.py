"""`graphopt calibrate`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from graphopt.cli._common import MODEL, check_output, limits, progress
from graphopt.cli.quantize import DATA, cache, image_options, images
from graphopt.errors import InputError


@click.command(no_args_is_help=True)
@click.argument("model", type=MODEL)
@click.option("--data", required=True, help=DATA)
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="The .npz to write."
)
@click.option(
    "--shard",
    metavar="K/N",
    default="1/1",
    help="See the K-th of N parts of the samples; each process or machine takes one.",
)
@click.option("--target", default="cpu", show_default=True)
@click.option("--placement", help="A table of placements by name instead of the target's.")
@click.option("--activations", help="A type: uint8, int8, uint16, int16, e4m3, e5m2.")
@click.option("--samples", "limit", type=click.IntRange(1), help="Of all parts: only so many.")
@image_options
@click.option("--overwrite", is_flag=True)
@click.option("--cache", type=click.Path(file_okay=False, path_type=Path))
@click.option("--no-cache", is_flag=True, help="Begin anew where a run was cut off.")
@click.option("-q", "--quiet", is_flag=True)
@click.option("--time-limit", type=click.FloatRange(min=0), metavar="SECONDS")
def calibrate(model: Path, **options: Any) -> None:
    """See what values MODEL's tensors have, for `quantize --calibration`.

    A run that was cut off goes on where it last saved. Parts are added up by `quantize`, which
    checks that all are there and of one model; then it needs no samples, and does without what
    they are for beyond ranges: moving outliers, GPTQ, corrected biases and a score.

    \b
    graphopt calibrate model.onnx --data samples.npz --shard 1/4 -o parts/1.npz
    graphopt quantize model.onnx --calibration 'parts/*.npz' -o int8.onnx
    """
    from graphopt import quantization
    from graphopt.passes.quantize_static import QuantizeStatic

    output: Path = options["output"]
    check_output(output, options["overwrite"])
    named = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", options["shard"])
    if named is None or int(named[1]) > int(named[2]):
        raise InputError(f"--shard is K/N with K from 1 to N, not {options['shard']!r}")
    single = QuantizeStatic(options["placement"] or "", activations=options["activations"] or "")
    with limits(options["time_limit"], None), progress(options["quiet"]) as show:
        shard = quantization.calibrate(
            model,
            options["data"],
            shard=(int(named[1]) - 1, int(named[2])),
            target=options["target"],
            options=single,
            limit=options["limit"],
            images=images(options),
            cache=cache(options),
            progress=show,
        )
        shard.save(output)
    if not options["quiet"]:
        seen = shard.sketches
        click.echo(f"{output}: {len(seen.tensors)} tensors of {seen.samples} samples")
