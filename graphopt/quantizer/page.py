"""The report of a quantization as one page: tables and figures, nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from graphopt import plots
from graphopt.quantizer.histograms import Histogram
from graphopt.quantizer.report import Quantization
from graphopt.quantizer.scoring import Layer, LayerPair

__all__ = ["layers_page", "page"]

_SHOWN = 400  # bars of a figure
_HISTOGRAMS = 200
_Figures = list[tuple[str, str]]


def page(report: Quantization) -> str:
    """HTML of a report; `figures` of `quantize` fills in what it draws."""
    sections: list[tuple[str, _Figures]] = [("Result", list(_summary(report)))]
    if report.layers:
        sections.append(("Layers", _layer_figures(report.layers)))
    if report.sensitivity:
        sections.append(("Sensitivity", list(_sensitivity(report))))
    for kind in ("activation", "weight"):
        found = [histogram for histogram in report.histograms if histogram.kind == kind]
        if found:
            title = f"{kind.capitalize()}s and their ranges"
            if len(found) > _HISTOGRAMS:
                title += f" (the first {_HISTOGRAMS} of {len(found)})"
            sections.append((title, [_histogram(one) for one in found[:_HISTOGRAMS]]))
    return plots.page(f"Quantization of {report.source}", sections)


def layers_page(first: str, second: str, found: Sequence[LayerPair]) -> str:
    """HTML of two models' layers, by their files' names."""
    own = [Layer(one.name, one.op, one.sqnr_db) for one in found]
    sections = [(first, _layer_figures(own))]
    if any(one.other_db is not None for one in found):
        other = [Layer(one.name, one.op, one.other_db) for one in found]
        sections.append((second, _layer_figures(other)))
    return plots.page(f"Layers of {first} and {second}", sections)


def _layer_figures(layers: list[Layer]) -> _Figures:
    """Signal over noise by layer, in the order of the graph: a figure and a table."""
    known = [(layer, layer.sqnr_db) for layer in layers if layer.sqnr_db is not None]
    if len(known) > _SHOWN:
        worst = sorted(known, key=lambda pair: pair[1])[:_SHOWN]
        known = [pair for pair in known if pair in worst]
    bars = plots.bars(((layer.name, value) for layer, value in known), unit="dB")
    rows = ((layer.name, layer.op, f"{value:.2f}") for layer, value in known)
    caption = "Signal to quantization noise of each tensor that both models have"
    return [(caption, bars), ("", plots.table(("tensor", "operator", "SQNR dB"), rows))]


def _summary(report: Quantization) -> Iterator[tuple[str, str]]:
    rows: list[tuple[str, str, str]] = []
    size = (f"{report.bytes_before:,}", f"{report.bytes_after:,}")
    rows.append(("bytes of weights", *size))
    if report.milliseconds_before is not None and report.milliseconds_after is not None:
        times = (report.milliseconds_before, report.milliseconds_after)
        rows.append(("latency, ms", f"{times[0]:.4g}", f"{times[1]:.4g}"))
    found = report.score
    if found is not None:
        if found.before is not None and found.after is not None:
            rows.append(("metric", f"{found.before:.4g}", f"{found.after:.4g}"))
        if found.agreement is not None:
            rows.append(("agreement", "", f"{100 * found.agreement:.2f} %"))
        noise = "exact" if found.sqnr_db is None else f"{found.sqnr_db:.2f}"
        rows.append(("SQNR, dB", "", noise))
    if report.kernels is not None:
        kernels = report.kernels
        rows.append(("integer kernels", "", f"{kernels.integer} of {kernels.total}"))
    yield "", plots.table(("", "float", "quantized"), rows)
    data = f"{report.samples} samples of {report.where}"
    facts = [("method", f"{report.method} ({report.reason})"), ("data", data)]
    facts += [("target", report.target), ("placement", report.placement)]
    facts += [("step", step) for step in report.steps]
    facts += [("note", note) for note in report.notes]
    if report.random:
        facts.append(("note", "calibrated on RANDOM data: figures say nothing about real inputs"))
    if report.kept:
        facts.append((f"{report.rung} instead", ", ".join(report.kept)))
    if report.refused:
        facts.append(("NOT QUANTIZED", report.refused))
    yield "", plots.table(("", ""), [fact for fact in facts if fact[1]])


def _sensitivity(report: Quantization) -> Iterator[tuple[str, str]]:
    ranked = list(report.sensitivity.items())
    total = 0.0
    left = [(float(len(ranked)), 0.0)]
    for index, (_, noise) in reversed(list(enumerate(ranked))):
        total += noise
        left.append((float(index), total))
    curve = plots.curves(
        {"noise": left[::-1]}, x="operators left in floats, the worst first", y="noise over signal"
    )
    yield "Noise of those that are quantized, added up", curve
    if report.tried:
        tried: dict[str, list[tuple[float, float]]] = {}
        for rung, count, drop in report.tried:
            tried.setdefault(rung, []).append((float(count), drop))
        series = {rung: sorted(points) for rung, points in tried.items()}
        axes = {"x": "operators moved, the worst first", "y": "drop"}
        yield (
            "What the search for the budget measured",
            plots.curves(series, x=axes["x"], y=axes["y"], limit=report.limit),
        )
    yield (
        "Noise over signal at the outputs, each operator quantized alone",
        plots.bars(ranked[:_SHOWN]),
    )


def _histogram(found: Histogram) -> tuple[str, str]:
    marks = {"low": found.low, "high": found.high}
    known = {name: value for name, value in marks.items() if value is not None}
    return found.name, plots.histogram(found.edges, found.counts, marks=known)
