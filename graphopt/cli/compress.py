"""`graphopt compress`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from graphopt.cli._common import (
    MODEL,
    check_output,
    console,
    json_option,
    progress,
    write_json,
)
from graphopt.errors import InputError

if TYPE_CHECKING:
    from graphopt.compression import Scheme


@click.command(no_args_is_help=True)
@click.argument("model", type=MODEL)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to write the result.")
@click.option("--scheme", metavar="NAME", help="How to store the weights; the table names them.")
@click.option(
    "--min-sqnr",
    type=float,
    metavar="DB",
    help="Take the scheme of the smallest file whose results keep this signal-to-noise ratio.",
)
@click.option("--data", metavar="DATA", help="Samples to measure with: .npz, folder, file.py:name.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace the output where it exists.")
@json_option
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def compress(
    model: Path,
    output: Path | None,
    scheme: str | None,
    min_sqnr: float | None,
    data: str | None,
    seed: int,
    overwrite: bool,
    json_to: str | None,
    quiet: bool,
) -> None:
    """Make the file of MODEL smaller; without -o, show what each scheme would come to.

    int4 has a scale for 32 weights of a product and, given samples, makes up for its errors.
    Without samples, piecewise-4 (two grids a channel) keeps half a decibel to three more of the
    results than palette-4 (16 values a tensor), for up to a tenth more bytes.

    An output that ends in .zst is packed without loss; every graphopt command reads it.

    \b
    graphopt compress model.onnx --data samples.npz
    graphopt compress model.onnx --scheme palette-4 -o small.onnx
    graphopt compress model.onnx --min-sqnr 30 --data samples.npz -o small.onnx.zst
    graphopt compress model.onnx -o model.onnx.zst
    """
    if scheme is not None and min_sqnr is not None:
        raise InputError("--scheme names one and --min-sqnr chooses one: give either")
    if output is None and scheme is not None:
        raise InputError("say where to write the result (-o OUT.onnx)")
    if output is not None:
        check_output(output, overwrite)
        if scheme is None and min_sqnr is None and output.suffix != ".zst":
            raise InputError(
                "say how: --scheme NAME, --min-sqnr DB, or an output that ends in .zst"
            )
    from graphopt import compression, files

    source = files.load(model)
    made = None
    with progress(quiet) as show:
        if output is None or min_sqnr is not None:
            found = compression.survey(source, data=data, seed=seed, progress=show)
            chosen = found[0] if min_sqnr is None else compression.smallest(found, min_sqnr)
        else:
            name = scheme or "lossless"
            show(name)
            chosen, made = compression.try_scheme(source, name, data=data, seed=seed)
            found = [chosen]
            if made is None:
                raise InputError(f"{model}: {name}: {chosen.reason}")
        if output is not None:
            show(f"writing {output}")
            if made is None:  # a survey keeps none of the many that it makes
                made = compression.compress(source, chosen.name, data=data, seed=seed)
            files.save(made, output, overwrite=overwrite)
    written: dict[str, str | int] | None = None
    if output is not None:
        written = {"scheme": chosen.name, "bytes": output.stat().st_size}
    _tell(model, output, written, found, json_to, quiet)


def _tell(
    model: Path,
    output: Path | None,
    written: Mapping[str, str | int] | None,
    found: list[Scheme],
    json_to: str | None,
    quiet: bool,
) -> None:
    import dataclasses

    from graphopt.cli._report import size
    from graphopt.report import finite

    if json_to:
        schemes = [dataclasses.asdict(scheme) for scheme in found]
        write_json(finite({"source": str(model), "schemes": schemes, "written": written}), json_to)
    if quiet or json_to == "-":
        return
    out = console()
    out.print(_table(found))
    for scheme in found:
        if scheme.reason:
            out.print(f"{scheme.name}: not for this model: {scheme.reason}")
    sampled = next((s.loss for s in found if s.loss is not None), None)
    if sampled is not None:
        count = f"{sampled.samples} sample{'' if sampled.samples == 1 else 's'}"
        out.print(f"SQNR and agreement over {count} ({sampled.where})")
    if written is not None:
        assert output is not None
        before = size(model.stat().st_size)
        out.print(f"{written['scheme']}: {before} -> {size(output.stat().st_size)} in {output}")


def _table(found: list[Scheme]) -> object:
    from rich import box
    from rich.table import Table

    from graphopt.cli._report import size

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("scheme")
    for name in ("file", "packed", "weights SNR", "SQNR", "agreement", "load"):
        table.add_column(name, justify="right")
    labelled = any(scheme.accuracy is not None for scheme in found)
    if labelled:
        table.add_column("accuracy", justify="right")
    for scheme in found:
        if scheme.reason:
            continue
        loss = scheme.loss
        compared = scheme.weight_snr_db is not None or loss is None or loss.sqnr_db is None
        table.add_row(
            scheme.name,
            size(scheme.bytes),
            "needs graphopt[zstd]" if scheme.packed_bytes is None else size(scheme.packed_bytes),
            _decibels(scheme.weight_snr_db) if compared else "",
            _decibels(loss.sqnr_db if loss else None),
            _percent(None if loss is None else loss.agreement),
            f"{scheme.load_ms:.1f} ms",
            *([_percent(scheme.accuracy)] if labelled else []),
        )
    return table


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _decibels(figure: float | None) -> str:
    return "exact" if figure is None else f"{figure:.1f} dB"
