"""The `graphopt` command: a module for each subcommand; heavy imports wait until one runs."""

from __future__ import annotations

import click

from graphopt import __version__
from graphopt.cli._common import Group
from graphopt.cli.bench import bench
from graphopt.cli.bisect import bisect
from graphopt.cli.calibrate import calibrate
from graphopt.cli.compare import diff, verify
from graphopt.cli.compile import compile_command, run, serve_rpc
from graphopt.cli.compress import compress
from graphopt.cli.explain import explain
from graphopt.cli.inspect import inspect
from graphopt.cli.list import doctor, passes, targets
from graphopt.cli.optimize import optimize
from graphopt.cli.prune import prune
from graphopt.cli.quantize import check, quantize
from graphopt.cli.surgery import edit, extract, merge, split


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="graphopt")
def main() -> None:
    """Make ONNX models smaller and faster, and prove that they still do the same job.

    \b
    graphopt optimize model.onnx -o small.onnx     smaller, verified
    graphopt bench model.onnx small.onnx           how much faster, with confidence
    graphopt compile small.onnx --target cpu -o d  a folder to deploy

    \b
    Exit codes: 0 ok, 1 a gate failed, 2 bad input or usage, 3 backend or extra missing,
    4 compile or run failed, 5 verification failed, 124 time limit, 130 interrupted,
    143 terminated.
    """


main.add_section("Smaller and faster", optimize, quantize, calibrate, prune, compress)
main.add_section("Look and compare", inspect, verify, diff, bench, check, explain, bisect)
main.add_section("Deploy", compile_command, run, serve_rpc)
main.add_section("Change", extract, edit, merge, split)
main.add_section("This installation", passes, targets, doctor)
