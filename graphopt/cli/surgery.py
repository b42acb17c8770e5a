"""`graphopt extract`, `edit`, `merge` and `split`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from graphopt.cli._common import (
    MODEL,
    check_output,
    console,
    json_option,
    progress,
    setting,
    write_json,
)
from graphopt.errors import InputError

if TYPE_CHECKING:
    from graphopt import ir

F = TypeVar("F", bound=Callable[..., Any])
_OUT = click.Path(path_type=Path)


def _writing(function: F) -> F:
    """The options of every command that writes a model."""
    for option in (
        click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors."),
        json_option,
        click.option("--overwrite", is_flag=True, help="Replace the output where it exists."),
    ):
        function = option(function)
    return function


_output = click.option(
    "-o", "--output", type=_OUT, required=True, help="Where to write the result."
)


@click.command(no_args_is_help=True)
@click.argument("model", type=MODEL)
@_output
@click.option("--inputs", metavar="NAMES", help="Tensors that become the inputs: a,b.")
@click.option("--outputs", metavar="NAMES", help="Tensors that become the outputs: c,d.")
@_writing
def extract(
    model: Path,
    output: Path,
    inputs: str | None,
    outputs: str | None,
    overwrite: bool,
    json_to: str | None,
    quiet: bool,
) -> None:
    """Write the part of MODEL that computes some tensors from others.

    `graphopt inspect --nodes` lists the tensors. Inputs and outputs that are not given stay.

    \b
    graphopt extract model.onnx -o head.onnx --outputs /layer1/Relu_output_0
    graphopt extract model.onnx -o block.onnx --inputs a,b --outputs c
    """
    if inputs is None and outputs is None:
        raise InputError("name --inputs, --outputs or both")
    _check([model], [output], overwrite)
    from graphopt import surgery

    with progress(quiet) as show:
        show("cutting")
        result = surgery.extract(model, _names(inputs), _names(outputs))
    _write([(result, output)], overwrite, json_to, quiet)


@click.command(no_args_is_help=True)
@click.argument("model", type=MODEL)
@_output
@click.option("--freeze-dim", multiple=True, metavar="NAME=N", help="Give a dimension a size.")
@click.option("--rename-dim", multiple=True, metavar="OLD=NEW", help="Rename a dimension.")
@click.option("--rename", "renames", multiple=True, metavar="OLD=NEW", help="Rename a tensor.")
@click.option("--set-batch", metavar="N|NAME", help="Another batch size; a name makes it free.")
@click.option(
    "--batch-axis", multiple=True, metavar="INPUT=AXIS", help="Where it is, if not in front."
)
@click.option("--add-output", multiple=True, metavar="TENSOR", help="Put out a tensor too.")
@click.option("--drop-output", multiple=True, metavar="OUTPUT", help="Leave an output out.")
@click.option(
    "--prepend",
    multiple=True,
    metavar="WHAT",
    help="Work before an input: 'normalize{mean=[0.5],std=[0.5],uint8=true,nhwc=true}', "
    "'resize{mode=linear}'.",
)
@click.option(
    "--append",
    multiple=True,
    metavar="WHAT",
    help="Work after an output: 'softmax{axis=-1}', 'argmax', 'topk{k=5}', "
    "'nms{boxes=B,scores=S,iou=0.5,score=0.25}'.",
)
@click.option("--strip-metadata", is_flag=True, help="Remove documentation and metadata.")
@_writing
def edit(model: Path, output: Path, **options: Any) -> None:
    """Change MODEL's signature, or what is around it.

    Changes are made in the order listed here.

    \b
    graphopt edit model.onnx -o m.onnx --freeze-dim batch=1 --freeze-dim sequence=128
    graphopt edit model.onnx -o m.onnx --set-batch N
    graphopt edit model.onnx -o m.onnx --prepend 'normalize{scale=0.0039,uint8=true}' --append topk
    """
    _check([model], [output], options["overwrite"])
    from graphopt import files

    steps = _steps(options)
    if not steps:
        raise InputError("say what to change; see `graphopt edit --help`")
    with progress(options["quiet"]) as show:
        result = files.load(model)
        for name, step in steps:
            show(name)
            result = step(result)
    _write([(result, output)], options["overwrite"], options["json_to"], options["quiet"])


def _steps(options: dict[str, Any]) -> list[tuple[str, Callable[[ir.Model], ir.Model]]]:
    """What is to be done, in order."""
    from graphopt import surgery

    sizes = {k: _number(v, k) for k, v in map(setting, options["freeze_dim"])}
    dims = dict(map(setting, options["rename_dim"]))
    names = dict(map(setting, options["renames"]))
    axes = {k: _number(v, k) for k, v in map(setting, options["batch_axis"])} or None
    batch, added, dropped = (options[k] for k in ("set_batch", "add_output", "drop_output"))
    if axes and batch is None:
        raise InputError("--batch-axis says where --set-batch applies, which is not given")
    steps: list[tuple[str, Callable[[ir.Model], ir.Model]]] = []
    if sizes:
        steps.append(("dimensions", lambda m: surgery.freeze_dims(m, sizes)))
    if dims:
        steps.append(("dimensions", lambda m: surgery.rename_dims(m, dims)))
    if names:
        steps.append(("names", lambda m: surgery.rename(m, names)))
    if batch is not None:
        size = int(batch) if batch.lstrip("-").isdigit() else batch
        steps.append(("batch", lambda m: surgery.set_batch(m, size, axes=axes)))
    if added:
        steps.append(("outputs", lambda m: surgery.add_outputs(m, added)))
    if dropped:
        steps.append(("outputs", lambda m: surgery.drop_outputs(m, dropped)))
    for text in (*options["prepend"], *options["append"]):
        steps.append((text, _attachment(text, before=text in options["prepend"])))
    if options["strip_metadata"]:
        steps.append(("metadata", surgery.strip_metadata))
    return steps


def _attachment(text: str, *, before: bool) -> Callable[[ir.Model], ir.Model]:
    from graphopt import attachments, surgery
    from graphopt.pass_manager import parse_items

    items = list(parse_items(text))
    if len(items) != 1:
        raise InputError(f"{text!r}: give one thing at a time, in the order wanted")
    what, options = items[0]
    fitting = attachments.BEFORE if before else attachments.AFTER
    if what not in fitting:
        place = "before the inputs" if before else "after the outputs"
        raise InputError(f"nothing {place} is named {what!r}; there are {', '.join(fitting)}")
    return lambda model: surgery.attach(model, what, options)


def _number(text: str, name: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{name}={text}: {text!r} is no whole number") from None


@click.command(no_args_is_help=True)
@click.argument("first", type=MODEL)
@click.argument("second", type=MODEL)
@_output
@click.option(
    "--connect", multiple=True, metavar="OUT:IN", help="An output of FIRST to an input of SECOND."
)
@click.option("--prefix", default="", help="Put before names of SECOND that FIRST has too.")
@click.option("--share-inputs", is_flag=True, help="Inputs of the same name are one.")
@_writing
def merge(
    first: Path,
    second: Path,
    output: Path,
    connect: tuple[str, ...],
    prefix: str,
    share_inputs: bool,
    overwrite: bool,
    json_to: str | None,
    quiet: bool,
) -> None:
    """Make one model of FIRST and SECOND.

    By default outputs feed inputs of the same name.

    \b
    graphopt merge encoder.onnx decoder.onnx -o both.onnx --connect hidden:encoder_hidden
    """
    wires: dict[str, str] = {}
    for text in connect:
        out, colon, into = text.rpartition(":")
        if not colon or not out or not into:
            raise InputError(f"--connect is written OUTPUT:INPUT, not {text!r}")
        wires[out] = into
    _check([first, second], [output], overwrite)
    from graphopt import surgery

    with progress(quiet) as show:
        show("merging")
        result = surgery.merge(first, second, wires, prefix=prefix, share=share_inputs)
    _write([(result, output)], overwrite, json_to, quiet)


@click.command(no_args_is_help=True)
@click.argument("model", type=MODEL)
@click.argument("first", type=_OUT)
@click.argument("second", type=_OUT)
@click.option("--at", multiple=True, required=True, metavar="TENSOR", help="Where (repeatable).")
@_writing
def split(
    model: Path,
    first: Path,
    second: Path,
    at: tuple[str, ...],
    overwrite: bool,
    json_to: str | None,
    quiet: bool,
) -> None:
    """Write MODEL as two: FIRST up to some tensors, SECOND from these on.

    Whatever else SECOND needs of FIRST is passed on too.

    \b
    graphopt split model.onnx encoder.onnx decoder.onnx --at hidden
    """
    _check([model], [first, second], overwrite)
    from graphopt import surgery

    with progress(quiet) as show:
        show("splitting")
        parts = surgery.split(model, at)
    _write(list(zip(parts, (first, second), strict=True)), overwrite, json_to, quiet)


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _check(sources: list[Path], targets: list[Path], overwrite: bool) -> None:
    """Fail before the work rather than after it."""
    if len({target.absolute() for target in targets}) < len(targets):
        raise InputError(f"both parts would be written to {targets[0]}")
    for target in targets:
        check_output(target, overwrite, sources)


def _write(
    models: list[tuple[ir.Model, Path]], overwrite: bool, json_to: str | None, quiet: bool
) -> None:
    from graphopt import files, inspection

    data: list[dict[str, Any]] = []
    for model, path in models:
        files.save(model, path, overwrite=overwrite)
        found = inspection.inspect(model)
        ports = {
            kind: [{"name": p.name, "type": p.type, "shape": p.shape} for p in listed]
            for kind, listed in (("inputs", found.inputs), ("outputs", found.outputs))
        }
        data.append({"file": str(path), "nodes": found.nodes, **ports})
    if json_to:
        write_json({"written": data}, json_to)
    if quiet or json_to == "-":
        return
    out = console()
    for entry in data:
        out.print(f"{entry['file']}: {entry['nodes']} nodes")
        for kind in ("inputs", "outputs"):
            for port in entry[kind]:
                out.print(f"    {kind[:-1]} {port['name']} {port['type']} {port['shape']}")
