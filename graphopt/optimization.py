"""`optimize`: a model in, a smaller verified one out."""

from __future__ import annotations

import itertools
import json
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from graphopt import feeds, files, ir
from graphopt.context import FOLD_BYTES, Context
from graphopt.errors import GraphoptError, InputError, MissingError, VerificationError
from graphopt.losses import measure_loss
from graphopt.pass_manager import MAX_ROUNDS, Pass, PassManager, load_pass, parse_pipeline
from graphopt.passes import PIPELINES
from graphopt.report import Comparison, Loss, Report, Stats
from graphopt.target import Target
from graphopt.verification import verify as compare
from graphopt.verification import verify_changes

if TYPE_CHECKING:
    from graphopt.samples import Samples, SamplesLike

Verify = Literal["off", "end", "each"]
Feeds = Mapping[str, ir.Array]
_Check = Callable[[ir.Model, ir.Model], Comparison]


@ir.paused_gc()
def optimize(
    model: files.ModelLike,
    *,
    level: int = 2,
    passes: str | Path | Sequence[Pass | str] | None = None,
    enable: Sequence[str] = (),
    disable: Sequence[str] = (),
    target: str | Target = "portable",
    verify: Verify = "end",
    inputs: Feeds | None = None,
    data: SamplesLike | None = None,
    seed: int = 0,
    shapes: Mapping[str, Sequence[int | str]] | None = None,
    opset: int | None = None,
    keep_signature: bool = False,
    freeze_initializers: bool = False,
    lineage: bool = False,
    fold_bytes: int = FOLD_BYTES,
    bisect_limit: int | None = None,
    time_limit: float | None = None,
    memory_limit: int | None = None,
    after: Callable[[str, ir.Model], None] | None = None,
    progress: Callable[[str], None] | None = None,
    report: Report | None = None,
) -> ir.Model:
    """Optimize a model; the argument is left as it is.

    Args:
        model: a path, bytes, an `onnx.ModelProto`, an `onnx_ir.Model` or torch's `ONNXProgram`.
        level: 0 to 3, which of `graphopt.passes.PIPELINES` runs; ignored where `passes` is given.
        passes: pipeline text (`fold-constants{max_bytes=0},fuse-gelu`), a TOML file, or a list
            of such texts and pass objects.
        enable: further passes by name; they run after those of the level.
        disable: passes by name that do not run.
        target: `portable` (standard operators, any runtime) or a device, see `Target.names`; for
            a device, a level's passes are followed by those of the backend that compiles for it.
        verify: compare with the original at the `end`, after `each` pass, or `off`. A pass whose
            result differs is undone and named in the report.
        inputs: arrays by input name to verify with; random ones of `seed` where not given.
        data: samples for passes that calibrate, see `graphopt.samples.open_samples`; what a lossy
            pass costs is measured on them too.
        shapes: new shapes of graph inputs: ints, or names of symbolic dimensions.
        opset: the ai.onnx version to convert to first.
        keep_signature: list initializers as inputs again where a file of IR 3 did.
        freeze_initializers: make constants of initializers that a newer file lists as inputs too,
            which a caller could otherwise override; most are weights that an exporter listed.
            A target that is a device does so too, unless `keep_signature` is set.
        lineage: note in each node's metadata which nodes of the source it came from.
        fold_bytes: how much larger than what it frees a folded constant may be, in bytes.
        bisect_limit: apply only this many rewrites.
        time_limit: seconds, for the passes.
        memory_limit: bytes, for verification; a model that needs more is verified by regions.
        after: called with the name of each pass that changed something, and the model.
        progress: called with the name of each pass about to run.
        report: filled with what was done.

    Raises:
        InputError: the model, a pass, an option or the inputs cannot be used.
        GraphoptError: a pass crashed and verification, which would undo it, is off.
        VerificationError: the result differs and no single pass is to blame.
        TimeLimitError: the time limit was reached.
    """
    report = report if report is not None else Report()
    start = time.monotonic()
    original = files.load(model, keep_signature=keep_signature)
    if shapes:
        set_shapes(original, shapes)
    given = None if inputs is None else [feeds.check_feeds(inputs, original)]
    aim = Target.parse(target)
    deployed = aim.device != "any" and not keep_signature
    _overridable(original, freeze_initializers or deployed, report)
    if verify not in get_args(Verify):
        raise InputError(f"verify is one of {', '.join(get_args(Verify))}, not {verify!r}")
    pipeline, asked = select(level, passes, enable, disable, opset)
    if passes is None and level:
        fixed = [*disable, *(["convert-opset"] if opset is not None else [])]
        pipeline = arranged(pipeline, _legalizing(aim, fixed))
    report.source = str(model) if isinstance(model, str | Path) else original.graph.name or ""
    report.pipeline = ",".join(map(str, pipeline))
    report.target = aim.name
    report.requested = asked
    report.before = Stats.of(original)
    run = _Run(
        report=report,
        target=aim,
        verify=verify,
        inputs=given,
        samples=None if data is None else _open(data, original),
        seed=seed,
        fold_bytes=fold_bytes,
        rewrites_left=bisect_limit,
        deadline=None if time_limit is None else start + time_limit,
        memory_limit=memory_limit,
        after=after,
        progress=progress,
    )
    result = run.all(original, pipeline)
    if lineage:
        _write_lineage(result)
    report.after = Stats.of(result)
    report.seconds = time.monotonic() - start
    return result


def _open(data: SamplesLike, model: ir.Model) -> Samples:
    from graphopt.samples import open_samples  # what most runs do without

    return open_samples(data, model)


@dataclass
class _Run:
    """One call of `optimize`: stretches of exact passes, each verified, and lossy ones between."""

    report: Report
    target: Target
    verify: Verify
    inputs: list[dict[str, ir.Array]] | None
    samples: Samples | None
    seed: int
    fold_bytes: int
    rewrites_left: int | None
    deadline: float | None
    memory_limit: int | None
    after: Callable[[str, ir.Model], None] | None
    progress: Callable[[str], None] | None

    def all(self, model: ir.Model, pipeline: Sequence[Pass]) -> ir.Model:
        """Run the pipeline; `model` is left as it is unless verification is off."""
        result, lossy = model, False
        for stretch in _stretches(pipeline):
            if stretch and stretch[0].lossy:
                result, lossy = self._measured(result, stretch[0]), True
            else:
                result = self._verified(result, stretch)
        if self.samples is not None and not lossy:
            self.report.notes.append("the data was not used: no pass here is lossy")
        if lossy and self.verify != "off":
            self.report.losses.append(self._loss("all", model, result))
        return result

    def _passes(
        self, model: ir.Model, passes: Sequence[Pass], report: Report, check: _Check | None = None
    ) -> ir.Model:
        context = Context(
            model if self.verify == "off" else files.copy(model),
            target=self.target,
            fold_bytes=self.fold_bytes,
            rewrites_left=self.rewrites_left,
            deadline=self.deadline,
            samples=self.samples,
        )
        manager = PassManager(
            passes,
            check,
            self.after,
            self.progress,
            rounds=1 if passes and passes[0].lossy else MAX_ROUNDS,
        )
        result = manager.run(context, report)
        self.rewrites_left = context.rewrites_left
        return result

    def _check(self, before: ir.Model, now: ir.Model) -> Comparison:
        return verify_changes(before, now, seed=self.seed, memory_limit=self.memory_limit)

    def _verified(self, model: ir.Model, passes: Sequence[Pass]) -> ir.Model:
        """The model after exact passes, all of them compared with it, or those that agree."""
        left = self.rewrites_left
        record = Report()
        try:
            check = self._check if self.verify == "each" else None
            result = self._passes(model, passes, record, check)
        except GraphoptError:
            raise
        except Exception as error:
            if self.verify == "off":
                raise GraphoptError(
                    f"a pass crashed ({type(error).__name__}: {error}); "
                    "with verification on it is undone, named, and the rest goes on"
                ) from error
            record, self.rewrites_left = Report(), left
            result = self._passes(model, passes, record, self._check)
        if self.verify != "off":
            verdict = self._compare(model, result, record)

            def by_outputs(_: ir.Model, now: ir.Model) -> Comparison:
                return self._against(model, now)

            # By what each pass changed first; a difference that only shows in the outputs, such
            # as a rounding that the rest of the model blows up, needs whole runs.
            for blame in (self._check, by_outputs):
                if not verdict.different:
                    break
                record, self.rewrites_left = Report(), left
                result = self._passes(model, passes, record, blame)
                verdict = self._compare(model, result, record)
            if self.report.verification is None or self.report.verification.ok:
                self.report.verification = verdict
            if verdict.different:
                raise VerificationError(
                    f"the result differs from the original: {verdict.summary()}"
                )
        self.report.passes += record.passes
        self.report.notes += record.notes
        return result

    def _compare(self, before: ir.Model, now: ir.Model, record: Report) -> Comparison:
        if self.progress is not None:
            self.progress("verification")
        if not any(entry.rewrites for entry in record.passes):
            return self._check(before, now)  # what did not change need not run
        return self._against(before, now)

    def _against(self, before: ir.Model, now: ir.Model) -> Comparison:
        return compare(
            before, now, feeds=self.inputs, seed=self.seed, memory_limit=self.memory_limit
        )

    def _measured(self, model: ir.Model, single: Pass) -> ir.Model:
        """The model after a lossy pass, and what that cost; undone where the model then breaks."""
        record = Report()
        try:
            result = self._passes(model, [single], record)
        except GraphoptError:
            raise
        except Exception as error:
            raise GraphoptError(f"{single.name}: {type(error).__name__}: {error}") from error
        self.report.passes += record.passes
        if self.verify != "off" and any(entry.rewrites for entry in record.passes):
            try:
                self.report.losses.append(self._loss(single.name, model, result))
            except GraphoptError as error:
                record.passes[0].rolled_back = str(error)
                record.passes[0].rewrites.clear()
                return model
        return result

    def _loss(self, name: str, before: ir.Model, after: ir.Model) -> Loss:
        if self.progress is not None:
            self.progress(f"what {name} cost")
        return measure_loss(name, before, after, self.samples, seed=self.seed)


def _stretches(pipeline: Sequence[Pass]) -> Iterator[list[Pass]]:
    """The passes in order: each lossy one by itself, exact ones that follow each other together."""
    if not pipeline:
        yield []
    for lossy, group in itertools.groupby(pipeline, lambda single: single.lossy):
        passes = list(group)
        yield from ([single] for single in passes) if lossy else [passes]


def select(
    level: int,
    passes: str | Path | Sequence[Pass | str] | None,
    enable: Sequence[str],
    disable: Sequence[str],
    opset: int | None = None,
) -> tuple[list[Pass], list[str]]:
    """The passes to run, and the names of those that were asked for by name.

    Raises:
        InputError: a level, pass or option that does not exist.
    """
    asked: list[str] = []
    if isinstance(passes, Path) or (isinstance(passes, str) and passes.endswith(".toml")):
        chosen, asked, switched_on, switched_off = read_pipeline(Path(passes), level)
        enable, disable = [*switched_on, *enable], [*switched_off, *disable]
    elif passes is None:
        chosen = _of_level(level)
    else:
        given = [passes] if isinstance(passes, str) else passes
        chosen = [
            single
            for item in given
            for single in (parse_pipeline(item) if isinstance(item, str) else [item])
        ]
        asked = [p.name for p in chosen]
    added = {p.name: p for text in enable for p in parse_pipeline(text)}
    unwanted = {load_pass(name).name for name in disable}
    if opset is not None:
        unwanted.add("convert-opset")
    selected = [added.pop(p.name, p) for p in chosen] + list(added.values())
    asked += [p.name for text in enable for p in parse_pipeline(text)]
    first = [] if opset is None else [load_pass("convert-opset", {"version": opset})]
    return first + [p for p in selected if p.name not in unwanted], asked


def arranged(chosen: Sequence[Pass], legal: Sequence[Pass]) -> list[Pass]:
    """Passes and those of a backend; its opset and precision go first: fusions depend on them.

    Passes that make what the backend's take apart are left out: they would never come to an end.
    """
    first = [single for single in legal if single.name in ("convert-opset", "convert-float32")]
    undone = frozenset[str]().union(*(single.undoes for single in legal))
    kept = [single for single in chosen if single.name not in undone]
    return [*first, *kept, *(single for single in legal if single not in first)]


def _legalizing(target: Target, disable: Sequence[str]) -> list[Pass]:
    """The passes of the backend that compiles for a device; none where no backend can."""
    from graphopt.compilation import choose  # which imports this module in turn

    if target.device == "any":
        return []
    try:
        backend = choose(target)
    except MissingError:
        return []
    unwanted = {load_pass(name).name for name in disable}
    return [single for single in backend.legalize(target) if single.name not in unwanted]


def _of_level(level: int) -> list[Pass]:
    if not 0 <= level < len(PIPELINES):
        raise InputError(f"no level {level}: there are 0 to {len(PIPELINES) - 1}")
    return parse_pipeline(",".join(PIPELINES[level]))


def read_pipeline(path: Path, level: int) -> tuple[list[Pass], list[str], list[str], list[str]]:
    """A pipeline from a TOML file: (passes, names of those that it lists, enable, disable).

    `level`, `enable` and `disable` are as on the command line; `passes` is a list of names in
    order; a table of a pass's name holds its options.

    Raises:
        InputError: not a readable TOML file of that form.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: {error}") from error
    lists: dict[str, list[str]] = {}
    for key in ("passes", "enable", "disable"):
        names: Any = data.pop(key, [])
        if not isinstance(names, list) or not all(isinstance(n, str) for n in cast(Any, names)):
            raise InputError(f"{path}: {key!r} is a list of names of passes")
        lists[key] = cast(list[str], names)
    level = data.pop("level", level)
    if type(level) is not int:
        raise InputError(f"{path}: 'level' is a number, not {level!r}")
    chosen = parse_pipeline(",".join(lists["passes"])) if lists["passes"] else _of_level(level)
    order = [p.name for p in chosen]
    for name, options in data.items():
        dashed = name.replace("_", "-")
        if not isinstance(options, dict):
            raise InputError(f"{path}: {name!r} is no setting and no table of a pass's options")
        if dashed not in order:
            raise InputError(f"{path}: options for {name!r}, which is not among the passes")
        chosen[order.index(dashed)] = load_pass(dashed, cast(dict[str, Any], options))
    asked = order if lists["passes"] else []
    return chosen, asked, lists["enable"], lists["disable"]


def set_shapes(model: ir.Model, shapes: Mapping[str, Sequence[int | str]]) -> None:
    """Give graph inputs new shapes, in place; output shapes that depend on them become unknown.

    Raises:
        InputError: no such input, another rank, or a size that contradicts a fixed one.
    """
    inputs = {value.name: value for value in model.graph.inputs}
    for name, dims in shapes.items():
        value = inputs.get(name)
        if value is None:
            known = ", ".join(str(n) for n in inputs)
            raise InputError(f"no input is named {name!r}; there are {known}")
        old = value.shape
        if old is not None:
            if len(old) != len(dims):
                raise InputError(f"input {name!r} has {len(old)} dimensions, not {len(dims)}")
            for have, want in zip(old, dims, strict=True):
                if isinstance(have, int) and isinstance(want, int) and want != have:
                    raise InputError(f"input {name!r} has a fixed dimension {have}, not {want}")
        value.shape = ir.Shape(list(dims))
    for output in model.graph.outputs:
        if output.shape is not None:
            output.shape = ir.Shape([d if isinstance(d, int) else None for d in output.shape])
    for graph in ir.graphs(model):
        for node in graph:
            for value in node.outputs:
                if not value.is_graph_output():
                    value.shape = None


def _overridable(model: ir.Model, freeze: bool, report: Report) -> None:
    """Make constants of initializers that are inputs too, or say that they hold passes back."""
    graph = model.graph
    listed = [value for value in graph.inputs if value.is_initializer()]
    if freeze:
        for value in listed:
            graph.inputs.remove(value)
        if listed:
            report.notes.append(
                f"{len(listed)} initializers were also inputs; now they are constants"
            )
    elif listed:
        report.notes.append(
            f"{len(listed)} initializers are also inputs, which callers may override, so they are "
            "no constants; freezing them (--freeze-initializers) lets more passes apply"
        )


def _write_lineage(model: ir.Model) -> None:
    for node in ir.all_nodes(model):
        node.metadata_props[ir.SOURCES] = json.dumps(list(ir.sources(node)))
