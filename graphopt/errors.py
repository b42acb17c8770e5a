"""What can go wrong, each with the exit code that the command line ends with."""

from __future__ import annotations


class GraphoptError(Exception):
    """A failure the user can act on: one line that names the file, the node and the cause."""

    exit_code = 4


class GateError(GraphoptError):
    """A limit that the user set (accuracy, latency, size) was not met."""

    exit_code = 1


class InputError(GraphoptError):
    """A model, a data file, an option or a path that cannot be used as given."""

    exit_code = 2


class Flaw(InputError):
    """What is wrong with a part of a model, before it is said in which file and node."""


class MissingError(GraphoptError):
    """A backend, a provider or an optional package that is not installed."""

    exit_code = 3


class VerificationError(GraphoptError):
    """The result does not compute what the original computes; nothing was written."""

    exit_code = 5


class MemoryLimitError(GraphoptError):
    """There was not the memory that the work takes."""


class TimeLimitError(GraphoptError):
    """The time limit was reached before a result was complete."""

    exit_code = 124


_KINDS = {
    kind.__name__: kind
    for kind in (
        *(GateError, InputError, Flaw, MissingError, VerificationError),
        *(MemoryLimitError, TimeLimitError),
    )
}


def by_name(name: str) -> type[GraphoptError]:
    """The class of an error that another process tells of; the general one where there is none."""
    return _KINDS.get(name, GraphoptError)
