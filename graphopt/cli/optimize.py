"""`graphopt optimize`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from graphopt.cli._common import (
    MODEL,
    NamedShape,
    Size,
    check_destination,
    check_output,
    console,
    json_option,
    level_option,
    limits,
    progress,
    verify_option,
    write_json,
)
from graphopt.errors import InputError

if TYPE_CHECKING:
    from graphopt import ir
    from graphopt.report import Report


@click.command(no_args_is_help=True)
@click.argument("model", type=MODEL)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to write the result.")
@level_option("0 nothing, 1 clean, 2 clean and fuse, 3 also what raises the opset.")
@click.option(
    "-p",
    "--passes",
    metavar="PIPELINE",
    help="Run exactly these passes: 'fold-constants{max_bytes=0},fuse-gelu', or a TOML file.",
)
@click.option("--enable", multiple=True, metavar="PASS", help="Run this pass too (repeatable).")
@click.option("--disable", multiple=True, metavar="PASS", help="Do not run this pass (repeatable).")
@click.option(
    "--target",
    default="portable",
    show_default=True,
    help="What to optimize for; see `graphopt targets`.",
)
@verify_option("Compare with the original at the end, or after each pass.")
@click.option("--inputs", type=MODEL, help="An .npz with one array per input, to verify with.")
@click.option(
    "--data",
    metavar="DATA",
    help="Samples for passes that calibrate or recover: an .npz, a folder, file.py:function.",
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the random inputs."
)
@click.option(
    "--set-shape",
    "shapes",
    type=NamedShape(),
    multiple=True,
    help="Fix an input's shape: image:1x3x224x224 (repeatable).",
)
@click.option("--opset", type=click.IntRange(1), help="Convert to this opset first.")
@click.option(
    "--keep-initializer-inputs",
    is_flag=True,
    help="List weights as inputs again where an old (IR 3) file did.",
)
@click.option(
    "--freeze-initializers",
    is_flag=True,
    help="Make constants of weights that a file also lists as inputs (callers could override).",
)
@click.option("--lineage", is_flag=True, help="Note in each node which source nodes it came from.")
@click.option(
    "--evaluate",
    type=MODEL,
    metavar="NPZ",
    help="Labelled samples (inputs and `labels`): compare accuracy and latency.",
)
@click.option("--dry-run", is_flag=True, help="Show what would change; write nothing.")
@click.option(
    "--dump-after",
    type=(str, click.Path(file_okay=False, path_type=Path)),
    metavar="PASS DIR",
    help="Save the model after this pass (or `all`) into DIR.",
)
@click.option(
    "--bisect-limit", type=click.IntRange(0), metavar="N", help="Apply only the first N rewrites."
)
@json_option
@click.option("--report", metavar="FILE", help="Write the report as JSON.")
@click.option("--overwrite", is_flag=True, help="Replace the output where it exists.")
@click.option("-v", "--verbose", is_flag=True, help="List every rewrite and refusal.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@click.option("--time-limit", type=click.FloatRange(min=0), metavar="SECONDS")
@click.option(
    "--memory-limit",
    type=Size(),
    metavar="SIZE",
    help="Such as 2G, beside what Python takes. Larger models are verified in parts.",
)
def optimize(model: Path, **options: Any) -> None:
    """Make MODEL smaller and faster; check that it computes the same.

    \b
    graphopt optimize model.onnx -o small.onnx
    graphopt optimize model.onnx -o small.onnx --set-shape image:1x3x224x224 -O3
    graphopt optimize model.onnx --dry-run -v
    graphopt optimize model.onnx -o small.onnx -p 'fold-constants,fuse-conv-batchnorm'
    """
    output: Path | None = options["output"]
    if output is None and not options["dry_run"]:
        raise InputError("say where to write the result (-o OUT.onnx), or use --dry-run")
    if output is not None and not options["dry_run"]:
        check_output(output, options["overwrite"], [model])
    for destination in (options["report"], options["json_to"]):
        if destination not in (None, "-"):
            check_destination(Path(destination))
    from graphopt.report import Report

    report = Report()
    with limits(options["time_limit"], options["memory_limit"]):
        source, result = _optimize(model, options, report)
        evaluation = _evaluate(source, result, options)
        if output is not None and not options["dry_run"]:
            from graphopt import files

            files.save(result, output, overwrite=options["overwrite"])
    _tell(model, report, evaluation, options)
    if report.rolled_back:
        raise SystemExit(5)


def _optimize(path: Path, options: dict[str, Any], report: Report) -> tuple[ir.Model, ir.Model]:
    from graphopt import feeds, files, optimization

    source = files.load(path, keep_signature=options["keep_initializer_inputs"])
    inputs = options["inputs"]
    after, wanted = None, "all"
    if options["dump_after"] is not None:
        wanted = options["dump_after"][0].replace("_", "-")
        after = _dumper(wanted, options["dump_after"][1])
    with progress(options["quiet"]) as show:
        result = optimization.optimize(
            source,
            level=options["level"],
            passes=options["passes"],
            enable=options["enable"],
            disable=options["disable"],
            target=options["target"],
            verify=options["verify"],
            inputs=None if inputs is None else feeds.load_feeds(inputs, source),
            data=options["data"],
            seed=options["seed"],
            shapes=dict(options["shapes"]),
            opset=options["opset"],
            keep_signature=options["keep_initializer_inputs"],
            freeze_initializers=options["freeze_initializers"],
            lineage=options["lineage"],
            bisect_limit=options["bisect_limit"],
            time_limit=options["time_limit"],
            memory_limit=options["memory_limit"],
            after=after,
            progress=show,
            report=report,
        )
    report.source = str(path)
    ran = {record.name for record in report.passes if record.rewrites or record.rolled_back}
    if wanted != "all" and wanted not in ran:
        report.notes.append(f"nothing was dumped: {wanted} changed nothing")
    return source, result


def _dumper(wanted: str, folder: Path) -> Any:
    from graphopt import files, pass_manager

    if wanted != "all":
        pass_manager.load_pass(wanted)  # an unknown name is an error now, not silence later
    folder.mkdir(parents=True, exist_ok=True)
    count = 0

    def dump(name: str, model: ir.Model) -> None:
        nonlocal count
        if wanted in ("all", name):
            count += 1
            files.save(model, folder / f"{count:03d}-{name}.onnx", overwrite=True)

    return dump


def _evaluate(source: ir.Model, result: ir.Model, options: dict[str, Any]) -> dict[str, Any] | None:
    from graphopt.cli import _report

    if options["evaluate"] is None:
        return None
    with progress(options["quiet"]) as show:
        return _report.evaluate(source, result, options["evaluate"], show)


def _tell(
    path: Path, report: Report, evaluation: dict[str, Any] | None, options: dict[str, Any]
) -> None:
    from graphopt.cli import _report

    data = report.to_dict()
    if evaluation is not None:
        data["evaluation"] = evaluation
    if options["report"]:
        write_json(data, options["report"])
    if options["json_to"]:
        write_json(data, options["json_to"])
    if not options["quiet"] and options["json_to"] != "-":
        written = None if options["dry_run"] else options["output"]
        _report.show(console(), report, path, written, evaluation, verbose=options["verbose"])
