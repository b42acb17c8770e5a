"""TensorRT and TensorRT for RTX: engines for NVIDIA's GPUs.

TensorRT for RTX builds without a GPU, for any that it knows; full TensorRT for the one it runs on.
Both are strongly typed: what is int8 or float16 in the model is that in the engine.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.artifact import Manifest
from graphopt.backends import make_options
from graphopt.backends._tensorrt_options import Options
from graphopt.errors import InputError, MissingError
from graphopt.target import Target

if TYPE_CHECKING:
    from graphopt import ir
    from graphopt.backends._tensorrt_executable import TensorrtExecutable
    from graphopt.pass_manager import Pass

ENGINE = "model.engine"
_LACKING = (
    *("AffineGrid", "BlackmanWindow", "CausalConvWithState", "CenterCropPad", "HammingWindow"),
    *("HannWindow", "LinearAttention", "NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss"),
    "SwiGLU",
)
"""Operators that its parser has not, and the standard defines by others."""


class Tensorrt:
    """The backend; see `graphopt.backends.Backend`."""

    name = "tensorrt"
    options = Options
    native_code = True

    def is_available(self) -> str | None:
        """Any of the packages, with its libraries."""
        from graphopt.backends._tensorrt_library import library

        try:
            library()
        except MissingError as error:
            return str(error)
        return None

    def versions(self) -> dict[str, str]:
        """The library's version, and which of the two it is."""
        from graphopt.backends._tensorrt_library import library

        trt = library()
        return {trt.__name__: str(trt.__version__)}

    def can_compile(self, target: Target) -> str | None:
        """GPUs that the library builds for; only RTX's builds for others than the one it is on."""
        if target.device != "cuda":
            return f"tensorrt is for NVIDIA GPUs, not for {target.name}"
        reason = self.is_available()
        if reason is not None:
            return reason
        from graphopt.backends import _cuda_driver
        from graphopt.backends._tensorrt_library import architectures

        known = architectures()
        if not known:
            return _cuda_driver.missing() or _mismatch(target)
        if target.arch and target.arch not in known:
            return f"this TensorRT does not build for {target.arch}, only for {', '.join(known)}"
        return None

    def can_run(self, target: Target) -> str | None:
        """Whether there is a GPU, of the engine's architecture."""
        if target.device != "cuda":
            return f"tensorrt is for NVIDIA GPUs, not for {target.name}"
        from graphopt.backends import _cuda_driver

        reason = self.is_available() or _cuda_driver.missing()
        return reason or _unknown_gpu() or _mismatch(target)

    def supports(self, model: ir.Model, target: Target, options: Any = None) -> dict[str, str]:
        """Asked of its parser."""
        from graphopt.backends import _tensorrt_build

        self._require(self.is_available())
        return _tensorrt_build.unsupported(model)

    def legalize(self, target: Target) -> tuple[Pass, ...]:
        """Opset, operators by simpler ones, and quantization that it lacks as arithmetic."""
        from graphopt.pass_manager import parse_pipeline

        expand = (
            f"expand-operators{{operators={_LACKING}}},expand-fourier,fold-constants,fold-shapes"
        )
        pipeline = f"convert-opset{{version=13,at_least=true}},inline-functions,{expand}"
        return tuple(parse_pipeline(f"{pipeline},convert-quantize"))

    def compile(self, model: ir.Model, target: Target, options: Options, folder: Path) -> None:
        """Build an engine."""
        from graphopt.backends import _tensorrt_build

        self._require(self.can_compile(target))
        engine = _tensorrt_build.build(model, target, options)
        (folder / ENGINE).write_bytes(engine)

    def remarks(self, folder: Path) -> list[str]:
        """None: its library chooses its kernels by itself."""
        return []

    def load(self, folder: Path, manifest: Manifest) -> TensorrtExecutable:
        """The engine on the first GPU."""
        reason = self.can_run(manifest.target)
        if reason is not None:
            raise MissingError(f"{folder} cannot run here: {reason}")
        if ENGINE not in manifest.files:
            raise InputError(f"{folder}: its manifest names no {ENGINE}")
        make_options(self, manifest.options)
        from graphopt.backends._tensorrt_executable import TensorrtExecutable

        return TensorrtExecutable(folder / ENGINE, manifest)

    def _require(self, reason: str | None) -> None:
        if reason is not None:
            raise MissingError(reason)


def _unknown_gpu() -> str | None:
    """Why the library does not run on the GPU here: RTX's is for some architectures only."""
    from graphopt.backends import _cuda_driver
    from graphopt.backends._tensorrt_library import architectures

    there, known = _cuda_driver.architecture(), architectures()
    if known and there not in known:
        return f"this TensorRT does not run on the {there} here, only on {', '.join(known)}"
    return None


def _mismatch(target: Target) -> str | None:
    """Why the GPU that is here is not the target."""
    from graphopt.backends import _cuda_driver

    there = _cuda_driver.architecture()
    if target.arch and target.arch != there:
        return f"it is for {target.arch} and the GPU here is {there}"
    return None


BACKEND = Tensorrt()
