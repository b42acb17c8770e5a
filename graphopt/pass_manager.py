"""Passes, their pipeline text, and the manager that runs, records, verifies and rolls back."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib
import inspect
import itertools
import pkgutil
import re
import sys
import time
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

from graphopt import files, ir
from graphopt.context import Context
from graphopt.driver import Driver
from graphopt.errors import GraphoptError, InputError
from graphopt.report import Comparison, PassRecord, Report
from graphopt.rewriting import Rule

MAX_ROUNDS = 10


@dataclass(frozen=True)
class Pass:
    """A transformation of a model. Its fields are its options, in Python and in pipeline text."""

    lossy: ClassVar[bool] = False
    """True where results change by more than rounding: it runs once, and its cost is measured."""

    @property
    def name(self) -> str:
        """The module's name with dashes: `fuse-gelu`."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", type(self).__name__).lower()

    @property
    def undoes(self) -> frozenset[str]:
        """Names of passes that make what this one takes apart."""
        return frozenset()

    def run(self, context: Context) -> None:
        """Change `context.model` and record each change with `context.changed`."""
        raise AssertionError(self)

    def __str__(self) -> str:
        """Pipeline text that makes this pass again."""
        options = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return self.name + (f"{{{','.join(options)}}}" if options else "")


@dataclass(frozen=True)
class RewritePass(Pass):
    """A pass that is a set of rewrite rules; neighbours in a pipeline run as one."""

    RULES: ClassVar[tuple[Rule, ...]] = ()

    def rules(self) -> Sequence[Rule]:
        """The rules, in order of preference."""
        return self.RULES

    def run(self, context: Context) -> None:
        Driver(context, [(rule, context.record) for rule in self.rules()]).run()


def headings(kind: type[Pass]) -> tuple[str, str]:
    """What a pass is for, and what it does to numbers, as the docstring of its module says."""
    text = " ".join((inspect.getdoc(sys.modules[kind.__module__]) or "").split())
    found = (re.search(rf"{head}: (.*?)(?= [A-Z]\w+: |$)", text) for head in ("Why", "Numerics"))
    why, numerics = (match[1].rstrip(". ") if match else "" for match in found)
    return why, numerics


@functools.cache
def pass_names() -> tuple[str, ...]:
    """Every pass there is: the modules of `graphopt.passes`."""
    package = importlib.import_module("graphopt.passes")
    names = (module.name for module in pkgutil.iter_modules(package.__path__))
    return tuple(sorted(name.replace("_", "-") for name in names if not name.startswith("_")))


def load_pass(name: str, options: Mapping[str, Any] | None = None) -> Pass:
    """The pass of a module, by name, with options.

    Raises:
        InputError: no such pass, or an option that it does not have or of another type.
    """
    names = pass_names()
    dashed = name.replace("_", "-")
    if dashed not in names:
        near = [n for n in names if dashed.split("-")[-1] in n]
        near = near or difflib.get_close_matches(dashed, names)
        hint = f"did you mean {', '.join(near)}?" if near else "see `graphopt passes`"
        raise InputError(f"no pass is named {name!r}: {hint}")
    kind = _pass_class(dashed)
    return kind(**_checked(dashed, kind, options or {}))


def _pass_class(name: str) -> type[Pass]:
    module = importlib.import_module(f"graphopt.passes.{name.replace('-', '_')}")
    class_name = "".join(word.capitalize() for word in name.split("-"))
    found = getattr(module, class_name, None)
    if found is None:
        rules = tuple(v for v in vars(module).values() if isinstance(v, Rule))
        found = type(class_name, (RewritePass,), {"RULES": rules, "__module__": module.__name__})
        setattr(module, class_name, found)
    kind: type[Pass] = found
    return kind


def _checked(name: str, kind: type[Pass], options: Mapping[str, Any]) -> dict[str, Any]:
    fields = {f.name for f in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    checked: dict[str, Any] = {}
    for key, value in options.items():
        key = key.replace("-", "_")
        if key not in fields:
            known = f"it has {', '.join(sorted(fields))}" if fields else "it has no options"
            raise InputError(f"pass {name!r} has no option {key!r}: {known}")
        wanted = hints[key]
        origin = typing.get_origin(wanted) or wanted
        if wanted is float and type(value) is int:
            value = float(value)
        if wanted is str and type(value) in (int, float):
            value = str(value)
        if origin is Literal and value not in typing.get_args(wanted):
            known = ", ".join(repr(choice) for choice in typing.get_args(wanted))
            raise InputError(f"option {key!r} of {name!r} is one of {known}, not {value!r}")
        if origin is tuple and isinstance(value, list | str):
            value = (value,) if isinstance(value, str) else tuple(cast(Sequence[Any], value))
        if isinstance(origin, type) and (
            not isinstance(value, origin) or (isinstance(value, bool) and origin is not bool)
        ):
            raise InputError(f"option {key!r} of {name!r} is {origin.__name__}, not {value!r}")
        checked[key] = value
    return checked


def parse_pipeline(text: str) -> list[Pass]:
    """Passes of a pipeline text: `fold-constants{max_bytes=0},fuse-gelu`.

    Raises:
        InputError: text that is no pipeline, or unknown passes and options.
    """
    return [load_pass(name, options) for name, options in parse_items(text)]


def parse_items(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names with their options from a text like `name{option=value,other=[1,2]},name`.

    Raises:
        InputError: text that is not of that form.
    """
    position, text = 0, text.strip()
    item = re.compile(r"\s*([A-Za-z][\w-]*)\s*(?:\{([^{}]*)\})?\s*(,|$)")
    while position < len(text):
        found = item.match(text, position)
        if found is None:
            raise InputError(f"not a pipeline: cannot read {text[position:][:40]!r}")
        yield found[1], _parse_options(found[2] or "")
        position = found.end()


def _parse_options(text: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for item in re.split(r",(?![^\[\(]*[\]\)])", text):
        if not item.strip():
            continue
        key, equals, value = item.partition("=")
        if not equals:
            raise InputError(f"an option is written name=value, not {item.strip()!r}")
        options[key.strip()] = _literal(value.strip())
    return options


def _literal(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        if text.startswith("[") and text.endswith("]"):
            return [_literal(item.strip()) for item in text[1:-1].split(",") if item.strip()]
        return text


@dataclass
class PassManager:
    """Runs passes in order, round after round, until a whole round changes nothing."""

    passes: Sequence[Pass]
    check: Callable[[ir.Model, ir.Model], Comparison] | None = None
    """Compares a model before and after a pass; set, each pass is verified and rolled back."""
    after: Callable[[str, ir.Model], None] | None = None
    """Called after each pass that ran by itself, e.g. to dump the model."""
    progress: Callable[[str], None] | None = None
    """Called with the name of what is about to run."""
    rounds: int = MAX_ROUNDS
    """At most so many; 1 for what is to run once."""

    def run(self, context: Context, report: Report | None = None) -> ir.Model:
        """Optimize `context.model`; returns the model that is left (after any rollback)."""
        report = report if report is not None else Report()
        if not report.pipeline:
            report.pipeline = ",".join(map(str, self.passes))
        for _ in range(self.rounds):
            done = sum(len(record.rewrites) for record in report.passes)
            for stage in self._stages():
                self._run_stage(stage, context, report)
            if context.exhausted or done == sum(len(r.rewrites) for r in report.passes):
                break
            context.refresh()
        else:
            if self.rounds > 1:
                report.notes.append(f"stopped after {self.rounds} rounds; more might be found")
        return context.model

    def _stages(self) -> Iterator[list[Pass]]:
        alone = self.check is not None or self.after is not None
        for mergeable, group in itertools.groupby(
            self.passes, lambda p: isinstance(p, RewritePass) and not alone
        ):
            if mergeable:
                yield list(group)
            else:
                yield from ([single] for single in group)

    def _run_stage(self, stage: list[Pass], context: Context, report: Report) -> None:
        records = [report.record(p.name) for p in stage]
        for single, record in zip(stage, records, strict=True):
            record.why = record.why or headings(type(single))[0]
        if context.exhausted or (len(stage) == 1 and records[0].rolled_back):
            return
        context.check_time()
        if self.progress is not None:
            self.progress(stage[0].name if len(stage) == 1 else f"{len(stage)} rewrite passes")
        before = files.copy(context.model) if self.check is not None else None
        counts = [len(record.rewrites) for record in records]
        start = time.perf_counter()
        if before is not None:
            self._attempt(stage[0], context, records[0], before)
        elif len(stage) == 1:
            context.record = records[0]
            stage[0].run(context)
        else:
            rules = [
                (rule, record)
                for single, record in zip(stage, records, strict=True)
                if isinstance(single, RewritePass)
                for rule in single.rules()
            ]
            Driver(context, rules).run()
        for record in records:
            record.seconds += (time.perf_counter() - start) / len(records)
        changed = counts != [len(record.rewrites) for record in records]
        if before is not None and changed:
            self._verify(before, context, records[0], counts[0])
        if self.after is not None and changed:
            self.after(stage[0].name, context.model)

    def _attempt(
        self, single: Pass, context: Context, record: PassRecord, before: ir.Model
    ) -> None:
        """Run a pass; one that crashes is undone, whatever the reason."""
        count = len(record.rewrites)
        context.record = record
        try:
            single.run(context)
        except GraphoptError:
            raise
        except Exception as error:  # noqa: BLE001 - a bug in one pass must not cost the others
            self._undo(context, record, before, count, f"{type(error).__name__}: {error}")

    @staticmethod
    def _undo(
        context: Context, record: PassRecord, before: ir.Model, count: int, reason: str
    ) -> None:
        record.rolled_back = reason
        del record.rewrites[count:]
        context.model = before
        context.refresh()

    def _verify(self, before: ir.Model, context: Context, record: PassRecord, count: int) -> None:
        assert self.check is not None
        verdict = self.check(before, context.model)
        if not verdict.different:
            return
        self._undo(context, record, before, count, verdict.summary())
