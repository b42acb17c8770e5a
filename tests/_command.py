"""The command, run within the tests' process."""

from __future__ import annotations

from click.testing import CliRunner

from graphopt.cli import main


def run(*arguments: object) -> tuple[int, str]:
    """Exit code and output of the command."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    return result.exit_code, result.output
