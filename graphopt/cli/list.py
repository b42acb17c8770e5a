"""`graphopt passes`, `graphopt targets`, `graphopt doctor`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import click

from graphopt.cli._common import console, json_option, write_json

_PACKAGES = {
    **dict.fromkeys(("numpy", "onnx", "onnx-ir", "onnxruntime", "onnx-graphsurgeon"), ""),
    "onnxscript": "'graphopt[onnxscript]'",
    "apache-tvm": "'graphopt[tvm]'",
    "tensorrt-rtx-cu13-bindings": "'graphopt[tensorrt]'",
}
"""What graphopt stands on or can use, and what to install for it where that has another name."""


@click.command()
@click.argument("name", required=False)
@json_option
def passes(name: str | None, json_to: str | None) -> None:
    """List the passes, or tell everything about one.

    \b
    graphopt passes
    graphopt passes fuse-gelu
    """
    from graphopt.pass_manager import load_pass, pass_names

    rows = [_describe(n) for n in ([load_pass(name).name] if name else pass_names())]
    if json_to:
        write_json(rows[0] if name else rows, json_to)
    if json_to == "-":
        return
    out = console()
    if not name:
        for row in rows:
            levels = f"O{min(row['levels'])}" if row["levels"] else "  "
            out.print(f"{row['name']:24} {levels}  {row['summary']}")
        return
    out.print(f"{rows[0]['name']}\n\n{rows[0]['documentation']}\n")
    for option in rows[0]["options"]:
        out.print(f"  {option['name']} ({option['type']}, default {option['default']!r})")
    level = min(rows[0]["levels"], default=None)
    out.print(f"on by default from -O{level}" if level is not None else "runs when asked for")


def _describe(name: str) -> dict[str, Any]:
    import importlib
    import inspect

    from graphopt.pass_manager import load_pass
    from graphopt.passes import PIPELINES

    module = importlib.import_module(f"graphopt.passes.{name.replace('-', '_')}")
    text = inspect.getdoc(module) or ""
    return {
        "name": name,
        "summary": text.partition("\n")[0],
        "documentation": text,
        "levels": [
            level
            for level, texts in enumerate(PIPELINES)
            if name in (text.partition("{")[0] for text in texts)
        ],
        "options": [
            {"name": f.name, "type": str(f.type), "default": f.default}
            for f in dataclasses.fields(load_pass(name))
        ],
    }


@click.command()
@click.argument("name", required=False)
@json_option
def targets(name: str | None, json_to: str | None) -> None:
    """List what a model can be optimized and compiled for, or tell what is missing for one of them.

    \b
    graphopt targets
    graphopt targets arm64
    """
    from graphopt import backends
    from graphopt.target import Target

    rows: list[dict[str, Any]] = []
    for each in [name] if name else Target.names():
        target = Target.parse(each)
        row: dict[str, Any] = {**target.to_dict(), "backends": {}}
        for backend_name in backends.names():
            backend = backends.get(backend_name)
            row["backends"][backend_name] = {
                "compile": backend.can_compile(target) or "yes",
                "run": backend.can_run(target) or "yes",
            }
        rows.append(row)
    if json_to:
        write_json(rows[0] if name else rows, json_to)
    if json_to == "-":
        return
    if name:
        _show_target(rows[0])
    else:
        _show_targets(rows)


def _show_targets(rows: Sequence[Mapping[str, Any]]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("target", "machine", *rows[0]["backends"]):
        table.add_column(title)
    for row in rows:
        words = [
            "runs" if verdict["run"] == "yes" else "compiles" if verdict["compile"] == "yes" else ""
            for verdict in row["backends"].values()
        ]
        table.add_row(row["name"], row["arch"] or "any", *words)
    console().print(table)
    console().print("`graphopt targets NAME` tells what is missing for one")


def _show_target(row: Mapping[str, Any]) -> None:
    out = console()
    out.print(" ".join([f"{row['name']:18}", row["arch"] or "any machine", *row["isa"]]))
    for backend_name, verdict in row["backends"].items():
        for verb, answer in verdict.items():
            out.print(f"{verb} with {backend_name}: {answer}")


@click.command()
@json_option
def doctor(json_to: str | None) -> None:
    """Check the installation; say how to get what is missing.

    \b
    graphopt doctor
    """
    import importlib.metadata
    import platform

    from graphopt import backends, places
    from graphopt.backends import _cuda_driver
    from graphopt.target import host

    packages: dict[str, str] = {}
    owners = importlib.metadata.packages_distributions()  # onnxruntime may be onnxruntime-gpu's
    for name, source in _PACKAGES.items():
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = [f"{importlib.metadata.version(n)} of {n}" for n in owners.get(name, ())]
            packages[name] = ", ".join(found) or f"not installed: pip install {source or name}"
    data: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": host().to_dict(),
        "packages": packages,
        "backends": {n: backends.get(n).is_available() or "ok" for n in backends.names()},
        "devices": {"cuda": _cuda_driver.missing() or _cuda_driver.architecture()},
        "folders": {
            "compiled models": str(places.cache("compiled")),
            "logs of compilers": str(places.state("logs")),
        },
    }
    if json_to:
        write_json(data, json_to)
    if json_to != "-":
        out = console()
        out.print(f"python {data['python']} on {data['platform']}")
        for section in ("packages", "backends", "devices", "folders"):
            for name, text in data[section].items():
                out.print(f"{section[:-1]:8} {name:27} {text}")
