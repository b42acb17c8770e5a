"""`graphopt quantize` and `graphopt check`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from graphopt.cli._common import (
    MODEL,
    F,
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
    from rich.console import Console

    from graphopt.quantization import Quantization
    from graphopt.samples.images import Images

DATA = "Samples: .npz, .npy, a folder, file.py:function (which is executed), or `random`."
_WORST = 8  # layers that are shown


def image_options(command: F) -> F:
    """Give a command the options that say how images are read."""
    for option in (
        click.option(
            "--order", type=click.Choice(["rgb", "bgr"]), default="rgb", show_default=True
        ),
        click.option("--layout", type=click.Choice(["nchw", "nhwc"])),
        click.option("--std", help="Likewise."),
        click.option(
            "--mean", help="Of images, in pixels of 0 to 255: one number, or one per colour."
        ),
        click.option("--image-size", metavar="HxW", help="Of a folder of images."),
    ):
        command = option(command)
    return command


@click.command(no_args_is_help=True)
@click.argument("model", type=MODEL)
@click.option("--data", help=DATA)
@click.option(
    "--calibration",
    multiple=True,
    metavar="FILES",
    help="What `calibrate` wrote: a folder, a file or a pattern in quotes (repeatable).",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The file to write.")
@click.option("--target", default="cpu", show_default=True)
@click.option(
    "--method",
    type=click.Choice(["auto", "static", "dynamic", "weights"]),
    default="auto",
    show_default=True,
    help="Ranges from the samples, ranges of run time, or weights alone.",
)
@click.option("--samples", "limit", type=click.IntRange(1), help="Use only the first so many.")
@click.option("--ranges", help="minmax, average, percentile, entropy, mse or lp.")
@click.option("--activations", help="A type: uint8, int8, uint16, int16, e4m3, e5m2.")
@click.option("--weights", help="A type: int8, uint8, int16, int4, e4m3 …")
@click.option(
    "--rounding", help="Of weights: nearest or gptq; rtn, mse, hqq, adaround … of few bits."
)
@click.option(
    "--average",
    type=click.FloatRange(2, 8),
    metavar="BITS",
    help="That a weight may take: layers get 8 where that helps most. For --method weights.",
)
@click.option(
    "--power-of-two", is_flag=True, help="Scales are 2**k, for hardware that shifts. Static only."
)
@click.option("--placement", help="A table of placements by name instead of the target's.")
@click.option(
    "--keep",
    multiple=True,
    metavar="NODE",
    help="Leave in floats: a node, a type, or a pattern such as 'head*' (repeatable).",
)
@click.option(
    "--max-drop",
    type=click.FloatRange(0),
    help="Of the metric (0.01 is a point); keeps operators in floats until it holds.",
)
@click.option(
    "--metric",
    metavar="FILE.py:FUNCTION",
    help="A figure of outputs and labels, higher is better; the file is executed.",
)
@click.option(
    "--fallback",
    type=click.Choice(["int16", "float16", "bfloat16", "float"]),
    help="What operators become first where the drop is too large; then floats. "
    "bfloat16 for targets whose runtime has it: cuda:sm_80 and later.",
)
@click.option(
    "--rotate/--no-rotate",
    default=None,
    help="Turn residual streams so that no channel stands out; by default where samples gain.",
)
@click.option("--max-latency", type=click.FloatRange(0), metavar="MS")
@click.option("--max-size", type=Size(), metavar="BYTES", help="Of the weights.")
@click.option("--force", is_flag=True, help="Write the result even if it is not faster.")
@click.option("--dry-run", is_flag=True, help="Do all of it and write nothing.")
@click.option(
    "--report",
    "page",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.html",
    help="A page with layers, ranges on histograms, and sensitivity.",
)
@click.option("--overwrite", is_flag=True)
@click.option("--cache", type=click.Path(file_okay=False, path_type=Path))
@click.option("--no-cache", is_flag=True, help="Forget what calibration saw.")
@image_options
@click.option(
    "--seconds",
    type=click.FloatRange(0),
    default=0.6,
    show_default=True,
    help="To measure latency for; 0 leaves it out.",
)
@json_option
@click.option("-q", "--quiet", is_flag=True)
@click.option("-v", "--verbose", is_flag=True, help="All layers.")
@click.option("--time-limit", type=click.FloatRange(min=0), metavar="SECONDS")
def quantize(model: Path, **options: Any) -> None:
    """Quantize MODEL on samples; say what that cost and gained.

    Where the result is not faster than floats, nothing is written and the exit code is 1, unless
    --force says otherwise. Ranges of run time (--method dynamic) and weights that are rounded each
    by itself (--method weights, --rounding rtn, mse or hqq) need no samples; static ranges, gptq
    and adaround do.

    \b
    graphopt quantize model.onnx --data samples.npz -o int8.onnx
    graphopt quantize model.onnx --data photos/ --mean 127.5 --std 127.5 -o int8.onnx
    graphopt quantize model.onnx --data feeds.py:feeds --target arm64 --max-drop 0.01 -o int8.onnx
    graphopt quantize model.onnx --data samples.npz --method weights --weights uint4 -o small.onnx
    graphopt quantize model.onnx --data samples.npz --method weights --average 4.6 -o small.onnx
    graphopt quantize model.onnx --method weights -o small.onnx
    graphopt quantize model.onnx --calibration 'parts/*.npz' -o int8.onnx
    graphopt quantize model.onnx --data samples.npz -o int8.onnx --report int8.html
    """
    from graphopt import files, quantization

    output: Path | None = options["output"]
    if output is None and not options["dry_run"]:
        raise InputError("say where to write the result with -o, or use --dry-run")
    page: Path | None = options["page"]
    for place in filter(None, (output, page)):
        check_output(place, options["overwrite"])
    report = quantization.Quantization()
    with limits(options["time_limit"], None), progress(options["quiet"]) as show:
        result = quantization.quantize(
            model,
            options["data"],
            calibration=_parts(options["calibration"]),
            target=options["target"],
            method=options["method"],
            options=_pass(options),
            limit=options["limit"],
            images=images(options),
            metric=_metric(options["metric"]),
            max_drop=options["max_drop"],
            max_latency=options["max_latency"],
            max_size=options["max_size"],
            fallback=options["fallback"] or "",
            rotate=options["rotate"],
            figures=page is not None,
            force=options["force"],
            cache=cache(options),
            seconds=options["seconds"],
            progress=show,
            report=report,
        )
        if output is not None and not options["dry_run"] and not report.refused:
            files.save(result, output, overwrite=options["overwrite"])
    if page is not None:
        write_page(page, report)
    if options["json_to"]:
        write_json(report.to_dict(), options["json_to"])
    if not options["quiet"] and options["json_to"] != "-":
        _show(console(), report, options["verbose"])
    if report.refused:
        raise SystemExit(1)


def write_page(path: Path, report: Quantization) -> None:
    """The report as HTML."""
    from graphopt import plots
    from graphopt.quantizer.page import page

    plots.write(path, page(report))


def _pass(options: dict[str, Any]) -> Any:
    from graphopt.pass_manager import load_pass

    method, keep = options["method"], {"keep": tuple(options["keep"])}
    static = ("ranges", "activations", "weights", "placement", "rounding")
    chosen = {name: options[name] for name in (*static, "average") if options[name] is not None}
    if options["power_of_two"]:
        chosen["power_of_two"] = True
    if method in ("auto", "static"):
        _refuse(chosen, {*static, "power_of_two"}, method)
        return load_pass("quantize-static", {**chosen, **keep})
    if method == "dynamic":
        _refuse(chosen, {"rounding"}, method)
        return load_pass("quantize-dynamic", {**chosen, **keep})
    _refuse(chosen, {"weights", "rounding", "average"}, method)
    kind = re.fullmatch(r"(u?)int([248])", options["weights"] or "uint4")
    if kind is None:
        raise InputError(f"weights are stored as int2, uint2 … uint8, not {options['weights']!r}")
    how = {"method": options["rounding"] or "", "symmetric": not kind[1], "bits": int(kind[2])}
    return load_pass("quantize-weights", {**how, **keep, "average": options["average"] or 0.0})


def _refuse(chosen: dict[str, Any], known: set[str], method: str) -> None:
    unused = sorted(set(chosen) - known)
    if unused:
        raise InputError(f"--{unused[0].replace('_', '-')} is not for --method {method}")


def cache(options: dict[str, Any]) -> Path | None:
    """The folder that calibration goes on from."""
    from graphopt import places

    if options["no_cache"]:
        return None
    return options["cache"] or places.cache("calibration")


def _parts(given: Sequence[str]) -> list[Path]:
    """The files that paths, folders and patterns name."""
    found: list[Path] = []
    for text in given:
        path = Path(text)
        files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
        if not path.exists():
            files = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
        if not files:
            raise InputError(f"{text}: no such file, or no .npz in it")
        found += files
    return found


def _metric(text: str | None) -> Any:
    from graphopt.samples.reading import user_function

    if text is None:
        return None
    function: Any = user_function(text)

    def metric(outputs: Any, labels: Any) -> Any:
        try:
            return function(outputs, labels)
        except Exception as error:
            raise InputError(f"{text}: fails with {type(error).__name__}: {error}") from error

    return metric


def images(options: dict[str, Any]) -> Images:
    """What the options of `image_options` say."""
    from graphopt.samples.images import Images

    size = None
    if options["image_size"]:
        sides = _numbers(options["image_size"].replace("x", ","))
        if len(sides) != 2:
            raise InputError("--image-size is written HEIGHTxWIDTH")
        size = (int(sides[0]), int(sides[1]))
    return Images(
        mean=_numbers(options["mean"]) if options["mean"] else None,
        std=_numbers(options["std"]) if options["std"] else None,
        size=size,
        layout=options["layout"] or "",
        order=options["order"],
    )


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"{text!r} is no list of numbers with commas between them") from error


def _show(out: Console, report: Quantization, verbose: bool) -> None:
    from rich import box
    from rich.table import Table

    from graphopt.cli._report import size

    out.print(f"{report.method} ({report.reason}), {report.placement or report.target}")
    for step in report.steps:
        out.print(f"  {step}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("", "float", "quantized", ""):
        table.add_column(title, justify="left" if not title else "right")
    table.add_row("weights", size(report.bytes_before), size(report.bytes_after), "")
    if report.milliseconds_before is not None and report.milliseconds_after is not None:
        before, after = report.milliseconds_before, report.milliseconds_after
        table.add_row("latency", f"{before:.3g} ms", f"{after:.3g} ms", f"x {report.ratio:.2f}")
    found = report.score
    if found is not None:
        if found.before is not None and found.after is not None:
            table.add_row("metric", f"{found.before:.4g}", f"{found.after:.4g}", "")
        if found.agreement is not None:
            table.add_row("agreement", "", f"{100 * found.agreement:.1f} %", "")
        noise = "exact" if found.sqnr_db is None else f"{found.sqnr_db:.1f} dB"
        table.add_row("SQNR", "", noise, f"{found.samples} samples")
    if report.kernels is not None:
        kernels = report.kernels
        table.add_row("integer kernels", "", f"{kernels.integer} of {kernels.total}", "")
    out.print(table)
    _show_layers(out, report, verbose)
    if report.kept:
        out.print(f"{report.rung} to stay within the budget: {', '.join(report.kept)}")
    if report.random:
        out.print("note: calibrated on RANDOM data; figures say nothing about real inputs")
    for note in report.notes:
        out.print(f"note: {note}")
    if report.refused:
        out.print(f"NOT QUANTIZED: {report.refused}")


def _show_layers(out: Console, report: Quantization, verbose: bool) -> None:
    rows = [layer for layer in report.layers if layer.sqnr_db is not None]
    if not rows:
        return
    if not verbose:
        rows = sorted(rows, key=lambda layer: layer.sqnr_db or 0.0)[:_WORST]
        out.print("layers with the most noise:")
    for layer in rows:
        decibels = layer.sqnr_db or 0.0
        bar = "█" * max(1, round(decibels / 2))
        out.print(f"  {decibels:6.1f} dB  {bar:25} {layer.op:14} {layer.name}")


@click.command(no_args_is_help=True)
@click.argument("model", type=MODEL)
@click.option("--target", default="cpu", show_default=True)
@click.option("--placement", help="A table of placements by name instead of the target's.")
@click.option("--power-of-two", is_flag=True, help="Scales are to be 2**k.")
@click.option(
    "--repair", type=click.Path(path_type=Path), metavar="FILE", help="Write it repaired."
)
@click.option("--overwrite", is_flag=True)
@json_option
@click.option("-q", "--quiet", is_flag=True)
def check(model: Path, **options: Any) -> None:
    """List what in a quantized MODEL its target cannot use.

    The exit code is 1 if there is anything.

    \b
    graphopt check int8.onnx --target cpu
    graphopt check from_another_tool.onnx --repair int8.onnx
    graphopt check int8.onnx --placement tensorrt --json -
    """
    from graphopt import files, optimization
    from graphopt.quantizer.checking import check_quantized
    from graphopt.quantizer.placement import table_for
    from graphopt.target import Target

    repaired: Path | None = options["repair"]
    if repaired is not None:
        check_output(repaired, options["overwrite"])
    loaded = files.load(model)
    table = table_for(Target.parse(options["target"]), options["placement"] or "")
    if options["power_of_two"]:
        table = table.powers_of_two()
    found = check_quantized(loaded, table)
    left = found
    if repaired is not None:
        text = f"repair-qdq{{placement={table.name}}}"
        result = optimization.optimize(loaded, passes=text, target=options["target"])
        left = check_quantized(result, table)
        files.save(result, repaired, overwrite=options["overwrite"])
    if options["json_to"]:
        rows = [{"rule": v.rule, "node": v.node, "reason": v.reason} for v in left]
        before = {"violations_before": len(found)} if repaired else {}
        write_json({"placement": table.name, **before, "violations": rows}, options["json_to"])
    if not options["quiet"] and options["json_to"] != "-":
        out = console()
        for violation in left:
            out.print(f"{violation.rule:24} {violation.node}: {violation.reason}")
        was = f", {len(found)} before the repair" if repaired else ""
        out.print(f"{table.name}: {len(left)} violations{was}")
    if left:
        raise SystemExit(1)
