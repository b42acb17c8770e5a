"""What the commands share: errors as one line with an exit code, output, option types."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from graphopt import atomic
from graphopt.errors import GraphoptError, InputError

if TYPE_CHECKING:
    from rich.console import Console

_OWN_BYTES = 256 << 20  # what Python and its libraries take before there is a model

F = TypeVar("F", bound=Callable[..., Any])
_PIPE_WIDTH = 1 << 16  # lines in a pipe or a file are not broken: scripts read them


class Group(click.Group):
    """A click group in sections; every failure is one line and the exit code of its kind."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sections: dict[str, list[click.Command]] = {}

    def add_section(self, title: str, *commands: click.Command) -> None:
        """Add commands that the help lists together, in this order."""
        self._sections[title] = list(commands)
        for command in commands:
            self.add_command(command)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections of commands into the help."""
        width = formatter.width - 6 - max(map(len, self.commands))
        for title, commands in self._sections.items():
            with formatter.section(title):
                formatter.write_dl([(str(c.name), c.get_short_help_str(width)) for c in commands])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _terminable():
                return super().invoke(ctx)
        except GraphoptError as error:
            fail(str(error), error.exit_code)
        except (KeyboardInterrupt, click.Abort):
            fail("interrupted", 130)
        except MemoryError:
            fail("out of memory; see --memory-limit", 4)
        except BrokenPipeError:
            sys.stderr.close()
            raise SystemExit(1) from None
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx is not None else "graphopt"
            fail(f"{error.format_message().rstrip('.')} (see `{command} --help`)", 2)
        except (click.ClickException, click.exceptions.Exit, SystemExit):
            raise
        except Exception as error:
            if os.environ.get("GRAPHOPT_TRACEBACK"):
                raise
            text = " ".join(str(error).split())[:300]
            fail(
                f"internal error: {type(error).__name__}: {text} "
                "(GRAPHOPT_TRACEBACK=1 shows where; please report it)",
                4,
            )


@contextlib.contextmanager
def _terminable() -> Generator[None]:
    """Within, what ends the process does so as an exception: children and folders go with it.

    That is SIGINT, SIGTERM, and SIGHUP of a terminal that is closed, unless `nohup` had it ignored.
    """

    def end(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # groups of processes are told twice
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        fail("terminated", 128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has not all
    signals = (number for number in signal.Signals if number.name in names)
    before = {number: signal.getsignal(number) for number in signals}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fail(message: str, code: int) -> None:
    """Print one line on stderr and end with the exit code."""
    click.echo(f"graphopt: {' '.join(message.split())}", err=True)
    raise SystemExit(code)


def console(*, stderr: bool = False) -> Console:
    """A rich console; colours only on terminals, names printed as they are."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPE_WIDTH
    return Console(stderr=stderr, highlight=False, markup=False, soft_wrap=False, width=width)


def check_destination(path: Path) -> None:
    """Find out before the work that a file cannot be written there.

    Raises:
        InputError: a folder is there, or there is no folder to put it in.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; name the file to write")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is no folder")


def check_output(path: Path, overwrite: bool, sources: Sequence[Path] = ()) -> None:
    """Find out before the work that a file cannot be written, or would replace another one.

    Raises:
        InputError: as `check_destination`, or a file is there and `overwrite` is not set.
    """
    check_destination(path)
    if path.exists() and not overwrite:
        same = any(path.samefile(source) for source in sources)
        raise InputError(f"{path} {'is the input' if same else 'exists'}; use --overwrite")


def write_json(data: Any, destination: str) -> None:
    """Write JSON to a file, or to stdout where the destination is `-`."""
    text = json.dumps(data, indent=2, allow_nan=False)
    if destination == "-":
        click.echo(text)
        return
    atomic.write(Path(destination), lambda file: file.write(text.encode() + b"\n"))


@contextlib.contextmanager
def progress(quiet: bool) -> Generator[Callable[[str], None]]:
    """A function that shows what is being done, on terminals only."""
    if quiet or not sys.stderr.isatty():
        yield lambda text: None
        return
    with console(stderr=True).status("") as status:
        yield status.update


@contextlib.contextmanager
def limits(seconds: float | None, memory: int | None) -> Generator[None]:
    """Bound the process: an alarm for the time, an address-space limit for the memory.

    Raises:
        TimeLimitError: from wherever the process is once the time is over.
    """
    import resource

    from graphopt.errors import TimeLimitError

    def expire(_signal: int, _frame: object) -> None:
        raise TimeLimitError(f"time limit of {seconds:g} s reached; nothing was written")

    old = resource.getrlimit(resource.RLIMIT_DATA)
    if memory is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory + _OWN_BYTES, old[1]))
    if seconds is not None:
        signal.signal(signal.SIGALRM, expire)
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_DATA, old)


class Size(click.ParamType[int]):
    """A number of bytes: 500M, 2G, 1048576."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", str(value).strip().lower())
        if found is None:
            self.fail(f"{value!r} is no size; write 500M or 2G", param, ctx)
        return int(float(found[1]) * 1024 ** " kmgt".index(found[2] or " "))


class NamedShape(click.ParamType[tuple[str, list[int | str]]]):
    """NAME:1x3x224x224; dimensions may be names; with commas these may have an x in them."""

    name = "name:shape"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return cast(Any, value)
        name, colon, text = str(value).rpartition(":")
        if not colon or not name:
            self.fail(f"{value!r}: write NAME:1x3x224x224", param, ctx)
        text = text.strip("[]() ")
        items = [d for d in text.split("," if "," in text else "x") if d.strip()]
        dims = [int(d) if re.fullmatch(r"-?\d+", d.strip()) else d.strip() for d in items]
        if any(isinstance(d, int) and d < 0 for d in dims):
            self.fail(f"{value!r}: a dimension is negative; name it to keep it dynamic", param, ctx)
        return name, dims


MODEL = click.Path(exists=True, dir_okay=False, path_type=Path)


def json_option(function: F) -> F:
    """`--json DESTINATION`."""
    return click.option(
        "--json", "json_to", metavar="FILE", help="Write the result as JSON to FILE, `-` is stdout."
    )(function)


def rpc_option(function: F) -> F:
    """`--rpc HOST:PORT`."""
    return click.option(
        "--rpc", "device", metavar="HOST:PORT", help="Run it there, where `graphopt serve-rpc` is."
    )(function)


def level_option(text: str | None = None) -> Callable[[F], F]:
    """`-O N`, with its help."""
    return click.option(
        *("-O", "level"),
        type=click.IntRange(0, 3),
        default=2,
        show_default=True,
        metavar="N",
        help=text,
    )


def verify_option(text: str) -> Callable[[F], F]:
    """`--verify`, with its help."""
    return click.option(
        "--verify",
        type=click.Choice(["off", "end", "each"]),
        default="end",
        show_default=True,
        help=text,
    )


def setting(text: str) -> tuple[str, str]:
    """NAME=VALUE in two.

    Raises:
        InputError: no `=` in it.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"an option is written NAME=VALUE, not {text!r}")
    return name.strip(), value.strip()
