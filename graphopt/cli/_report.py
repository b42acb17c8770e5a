"""How commands show what they did and measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from graphopt import ir
    from graphopt.backends import OpTime
    from graphopt.report import Comparison, Loss, PassRecord, Report


def show(
    out: Console,
    report: Report,
    path: Path,
    written: Path | None,
    evaluation: dict[str, Any] | None,
    *,
    verbose: bool,
) -> None:
    """Print the passes that changed something, then the model before and after."""
    for record in report.passes:
        asked = record.name in report.requested or (verbose and record.refusals)
        if record.rewrites or record.rolled_back or asked:
            _show_pass(out, record, verbose)
    _show_table(out, report, path, written, evaluation)
    if report.verification is not None:
        out.print(_verdict(report.verification))
    for loss in report.losses:
        out.print(_loss(loss))
    refusals = report.refusals
    if refusals and not verbose:
        total, most = sum(refusals.values()), next(iter(refusals))
        out.print(
            f"declined at {_count(total, 'node')} for {_count(len(refusals), 'reason')}, "
            f"most often: {most} (-v lists them)"
        )
    for note in report.notes:
        out.print(f"note: {note}")


def _show_pass(out: Console, record: PassRecord, verbose: bool) -> None:
    if record.rolled_back:
        out.print(f"{record.name:24} ROLLED BACK: {record.rolled_back}")
        return
    refusals = sorted(record.refusals.items())
    reasons = "; ".join(f"{reason} ({_count(len(nodes), 'node')})" for reason, nodes in refusals)
    if record.rewrites:
        out.print(f"{record.name:24} {_count(len(record.rewrites), 'change')}")
    else:
        out.print(f"{record.name:24} changed nothing: {reasons or 'nothing here that it matches'}")
    if verbose:
        if record.rewrites and record.why:
            out.print(f"    why: {record.why}")
        for rewrite in record.rewrites:
            after = ", ".join(rewrite.after) or "nothing"
            out.print(f"    {rewrite.rule}: {', '.join(rewrite.before)} -> {after}")
        for reason, nodes in refusals:
            out.print(f"    declined at {', '.join(sorted(nodes))}: {reason}")


def _show_table(
    out: Console,
    report: Report,
    path: Path,
    written: Path | None,
    evaluation: dict[str, Any] | None,
) -> None:
    from rich import box
    from rich.table import Table

    assert report.before is not None and report.after is not None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column(path.name, justify="right")
    table.add_column("optimized", justify="right")
    table.add_column("", justify="right")
    before, after = report.before, report.after
    table.add_row("nodes", str(before.nodes), str(after.nodes), _change(before.nodes, after.nodes))
    sizes = (
        (path.stat().st_size, written.stat().st_size)
        if written is not None and before.bytes < path.stat().st_size
        else (before.bytes, after.bytes)
    )
    label = "file" if written is not None else "weights"
    table.add_row(label, size(sizes[0]), size(sizes[1]), _change(*sizes))
    for name, row in (evaluation or {}).items():
        table.add_row(name.replace("_", " "), row["before"], row["after"], row.get("change", ""))
    if report.verification is not None and report.verification.outputs:
        table.add_row("worst difference", "", f"{report.verification.worst:.1e}", "")
    out.print(table)


def _verdict(verdict: Comparison) -> str:
    if verdict.ok:
        how = "whole model" if verdict.how == "whole" else "by regions"
        return f"verified ({how}): {verdict.summary()}"
    return f"NOT FULLY VERIFIED: {verdict.summary()}"


def _loss(loss: Loss) -> str:
    """What a lossy pass cost, in a line."""
    told = [f"SQNR {loss.sqnr_db:.1f} dB" if loss.sqnr_db is not None else "no difference"]
    if loss.agreement is not None:
        told.append(f"agreement {100 * loss.agreement:.1f} %")
    what = "all lossy passes" if loss.name == "all" else loss.name
    return f"{what:24} {', '.join(told)} ({_count(loss.samples, 'sample')}, {loss.where})"


def size(count: float) -> str:
    """Bytes for people: 412 KB."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:.0f} {unit}"
        count /= 1000
    raise AssertionError


def _change(before: float, after: float) -> str:
    if not before or before == after:
        return ""
    percent = 100 * (after - before) / before
    return f"{percent:+.0f} %" if abs(percent) >= 0.5 else f"{percent:+.1g} %"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def evaluate(
    source: ir.Model, result: ir.Model, samples: Path, show: Callable[[str], None]
) -> dict[str, Any]:
    """Accuracy on labelled samples, and latency on the first of them, before and after.

    Raises:
        InputError: samples without `labels`, or that do not fit the model.
    """
    from graphopt import feeds, measurement

    arrays, labels = feeds.load_samples(samples, source)
    if labels is None:
        raise InputError(f"{samples}: no array is named 'labels'")
    measured = measurement.measure(
        {"before": source, "after": result},
        arrays,
        labels,
        process=False,
        progress=lambda done, what: show(f"{100 * done:.0f} % {what}"),
    )
    first, second = measured.models
    assert first.latency and second.latency and second.ratio
    assert first.accuracy is not None and second.accuracy is not None
    ratio = second.ratio
    return {
        "latency": {
            "before": f"{first.latency.p50_ms:.3g} ms",
            "after": f"{second.latency.p50_ms:.3g} ms",
            "change": f"x {ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})",
        },
        "accuracy": {
            "before": f"{100 * first.accuracy:.2f} %",
            "after": f"{100 * second.accuracy:.2f} %",
            "change": f"{100 * (second.accuracy - first.accuracy):+.2f} points",
        },
    }


def show_ops(out: Console, ops: Sequence[OpTime]) -> None:
    """The slowest nodes of a profile, with the time that each takes in a run."""
    if ops:
        out.print(f"microseconds per run, {sum(op.microseconds for op in ops):.1f} in all:")
    for op in sorted(ops, key=lambda op: -op.microseconds)[:30]:
        out.print(f"  {op.microseconds:10.1f}  {op.op:24} {op.node}")
