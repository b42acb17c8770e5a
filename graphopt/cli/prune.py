"""`graphopt prune`."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from graphopt.cli._common import (
    MODEL,
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

    from graphopt.pruner.recovery import Recovery
    from graphopt.pruner.reporting import PruneReport

_SHARE = click.FLOAT
_LISTED = 5  # weights named for each reason


@click.command(no_args_is_help=True)
@click.argument("model", type=MODEL)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to write the result.")
@click.option(
    "--ratio", type=_SHARE, default=0.5, show_default=True, help="Share of channels that goes."
)
@click.option(
    "--criterion",
    default="auto",
    help="l1, l2, lp:P, median, bn-scale, random; with data also activation, apoz, hessian, "
    "reconstruction, taylor. By default reconstruction with --recover, else l2.",
)
@click.option(
    "--scope",
    type=click.Choice(["auto", "uniform", "global", "sensitivity"]),
    default="auto",
    help="The same ratio for all, the least important of all, or by what the outputs lose. "
    "By default sensitivity for a budget with --recover, else uniform.",
)
@click.option(
    "--layer-ratio",
    "ratios",
    multiple=True,
    metavar="PATTERN=RATIO",
    help="A ratio of their own for weights whose name fits (repeatable).",
)
@click.option("--params", type=_SHARE, default=0.0, help="Share of parameters to keep instead.")
@click.option("--flops", type=_SHARE, default=0.0, help="Share of operations to keep instead.")
@click.option("--size", type=_SHARE, default=0.0, help="Share of the weights' bytes to keep.")
@click.option(
    "--latency", type=_SHARE, default=0.0, help="Share of the latency to get down to, measured."
)
@click.option(
    "--max-drop",
    type=_SHARE,
    help="Most to lose of accuracy or agreement, 0 to 1; without a budget, prune up to it.",
)
@click.option(
    "--round-to",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="Keep multiples of N channels; else of the target's alignment, or of 2 to 8.",
)
@click.option("--ignore", multiple=True, metavar="PATTERN", help="Nodes or weights that stay.")
@click.option("--only", multiple=True, metavar="PATTERN", help="All but these stay.")
@click.option("--exact", is_flag=True, help="Leave alone what LayerNorms and means run over.")
@click.option(
    "--keep-resolution",
    is_flag=True,
    help="Never make images smaller inside, which is one way to --flops, --latency, --max-drop.",
)
@click.option("--iterations", type=click.INT, default=1, show_default=True, metavar="N")
@click.option("--data", metavar="DATA", help="Samples: .npz, folder, file.py:name, or `random`.")
@click.option("--recover", is_flag=True, help="Refit what is left on the data; no labels needed.")
@click.option(
    "--epochs",
    type=click.IntRange(0),
    metavar="N",
    help="With --recover: then train on the original's results, N times through the data; "
    "default: for up to some minutes.",
)
@click.option(
    "--scan",
    default="",
    metavar="FILE",
    help="With --scope sensitivity: keep the measured curves there, and go on from them.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE.html",
    help="Write the curves of --scope sensitivity and what was kept there as a page.",
)
@click.option("--samples", type=click.IntRange(1), default=512, help="For recovery, at most.")
@click.option("--target", default="portable", show_default=True, help="See `graphopt targets`.")
@click.option("--no-benchmark", is_flag=True, help="Do not measure latency.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the criterion random.")
@json_option
@click.option("--overwrite", is_flag=True, help="Replace the output where it exists.")
@click.option("-v", "--verbose", is_flag=True, help="List every family and every reason.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@click.option("--time-limit", type=click.FloatRange(min=0), metavar="SECONDS")
def prune(model: Path, **options: Any) -> None:
    """Take the least important channels, heads and units out of MODEL.

    \b
    graphopt prune model.onnx --ratio 0.3 -o small.onnx
    graphopt prune model.onnx --flops 0.5 --data samples.npz --recover -o small.onnx
    graphopt prune model.onnx --max-drop 0.02 --scope sensitivity --data samples.npz \\
        --recover -o small.onnx
    graphopt prune model.onnx --ratio 0.5 --round-to 8 --ignore '*classifier*' -o small.onnx

    What is left computes what the original computes with the rest set to zero; this is checked.
    """
    output: Path | None = options["output"]
    if output is None:
        raise InputError("say where to write the result (-o OUT.onnx)")
    check_output(output, options["overwrite"], [model])
    if options["plot"]:
        check_output(options["plot"], options["overwrite"], [model])
    from graphopt import files, pruning

    report = pruning.PruneReport()
    passed = (
        *("ratio", "criterion", "scope", "ratios", "params", "flops", "size", "latency"),
        *("max_drop", "round_to", "ignore", "only", "exact", "iterations", "data", "target"),
        *("seed", "scan", "keep_resolution"),
    )
    with limits(options["time_limit"], None), progress(options["quiet"]) as show:
        result = pruning.prune(
            model,
            **{name: options[name] for name in passed},
            recover=_recovery(options),
            benchmark=not options["no_benchmark"],
            progress=show,
            report=report,
        )
        files.save(result, output, overwrite=options["overwrite"])
    if options["plot"]:
        _plot(report, options["plot"])
    if options["json_to"]:
        write_json({**report.to_dict(), "output": str(output)}, options["json_to"])
    if not options["quiet"] and options["json_to"] != "-":
        _tell(console(), report, output, verbose=options["verbose"])


def _plot(report: PruneReport, place: Path) -> None:
    """What the outputs lose by share of each family that goes, and what is left of each."""
    from graphopt import plots

    figures = [
        (name, plots.curves({name: sorted(curve.items())}, x="share that goes", y="loss"))
        for name, curve in report.curves.items()
    ]
    left = [(name, after / before) for name, (before, after) in report.families.items()]
    sections = [("Sensitivity", figures)] if figures else []
    sections.append(("Kept", [("share of each family's channels", plots.bars(left))]))
    if report.ranks:
        ranks = [(name, rank / full) for name, (full, rank) in report.ranks.items()]
        sections.append(("Ranks", [("share of each layer's rank", plots.bars(ranks))]))
    plots.write(place, plots.page(f"Pruning of {report.source}", sections))


def _recovery(options: dict[str, Any]) -> Recovery | bool:
    from graphopt.pruner.recovery import Recovery

    if not options["recover"]:
        if options["epochs"]:
            raise InputError("--epochs belongs to --recover")
        return False
    epochs = options["epochs"]
    return Recovery(samples=options["samples"], epochs=-1 if epochs is None else epochs)


def _tell(out: Console, report: PruneReport, output: Path, *, verbose: bool) -> None:
    from graphopt.cli._report import size

    before, after = report.before, report.after
    assert before is not None and after is not None
    out.print(f"{report.source} -> {output}")
    rows = (
        ("parameters", f"{before.parameters:,}", f"{after.parameters:,}"),
        ("weights", size(before.bytes), size(after.bytes)),
        ("operations", f"{before.flops:,}", f"{after.flops:,}"),
    )
    shares = (
        after.parameters / max(before.parameters, 1),
        after.bytes / max(before.bytes, 1),
        after.flops / max(before.flops, 1),
    )
    for (name, old, new), share in zip(rows, shares, strict=True):
        out.print(f"  {name:<11} {old} -> {new}  ({share:.1%})")
    if report.latency_ms is not None and report.latency_ratio is not None:
        first, then = report.latency_ms
        out.print(f"  {'latency':<11} {first:.3g} -> {then:.3g} ms  ({report.latency_ratio:.1%})")
    _tell_loss(out, report)
    for name, (old, new) in report.resized.items():
        out.print(f"{name} resized from {old} to {new} inside")
    cut = [(n, a, b) for n, (a, b) in report.families.items() if b < a]
    groups = sum(a - b for _, a, b in cut)
    out.print(f"{groups} groups of coupled channels went, of {len(cut)} families")
    for name, count, left in cut if verbose else ():
        out.print(f"  {name}: {count} -> {left}")
    if report.ranks:
        out.print(f"{len(report.ranks)} layers became two thinner ones")
    for name, (full, rank) in report.ranks.items() if verbose else ():
        out.print(f"  {name}: rank {full} -> {rank}")
    _tell_frozen(out, report, verbose)
    for note in report.notes:
        out.print(f"note: {note}")


def _tell_loss(out: Console, report: PruneReport) -> None:
    if report.accuracy is not None:
        old, new = report.accuracy
        out.print(f"  {'accuracy':<11} {old:.2%} -> {new:.2%}  ({(new - old) * 100:+.2f} points)")
    loss = report.loss
    if loss is not None:
        parts = [
            f"agreement {loss.agreement:.1%}" if loss.agreement is not None else "",
            f"SQNR {loss.sqnr_db:.1f} dB" if loss.sqnr_db is not None else "the same results",
        ]
        text = ", ".join(part for part in parts if part)
        out.print(f"  {'results':<11} {text} beside the original ({loss.where}, {loss.samples})")
    if report.masked_error is not None:
        out.print(f"  {'proof':<11} the original with these zeroed: {report.masked_error:.1e} off")
    if report.fits:
        mean = sum(fit.after for fit in report.fits) / len(report.fits)
        old_mean = sum(fit.before for fit in report.fits) / len(report.fits)
        out.print(
            f"  {'recovery':<11} {len(report.fits)} layers refitted, mean relative error "
            f"{old_mean:.3g} -> {mean:.3g}"
        )
    if report.training is not None:
        first, last = report.training
        out.print(f"  {'training':<11} error of the outputs {first:.3g} -> {last:.3g}")


def _tell_frozen(out: Console, report: PruneReport, verbose: bool) -> None:
    reasons: defaultdict[str, list[str]] = defaultdict(list)
    for name, reason in report.frozen.items():
        reasons[reason].append(name)
    if reasons and not verbose:
        out.print(f"{len(report.frozen)} axes of weights stay as they are (-v says why)")
    for reason, names in reasons.items() if verbose else ():
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        out.print(f"  stays: {', '.join(names[:_LISTED])}{more}: {reason}")
    for op, count in report.unknown.items():
        out.print(f"note: {count} {op} hold pruning back: there is no rule for this operator")
