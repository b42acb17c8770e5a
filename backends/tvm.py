"""TVM: models compiled ahead of time into a native library, with our own schedules."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from graphopt.artifact import Manifest
from graphopt.backends import make_options
from graphopt.backends._tvm_options import Options
from graphopt.errors import MissingError
from graphopt.target import Target

if TYPE_CHECKING:
    from graphopt import ir
    from graphopt.backends._tvm_executable import TvmExecutable
    from graphopt.pass_manager import Pass

_PACKAGES = {"apache-tvm": "0.27", "apache-tvm-ffi": "0.1.14"}
"""What the extra pins, by prefix: newer releases of the second crash while they serialise."""
_HINT = "pip install 'graphopt[tvm]'"
_LACKING = (
    *("Attention", "BlackmanWindow", "CausalConvWithState", "CenterCropPad"),
    *("HammingWindow", "HannWindow", "LinearAttention", "NegativeLogLikelihoodLoss"),
    *("RotaryEmbedding", "SoftmaxCrossEntropyLoss", "SwiGLU"),
)
"""Operators that its importer has not, or not all of, and the standard defines by others."""


class Tvm:
    """The backend; see `graphopt.backends.Backend`."""

    name = "tvm"
    options = Options
    native_code = True

    def is_available(self) -> str | None:
        """The pinned packages, found without importing them."""
        if importlib.util.find_spec("tvm") is None:
            return f"TVM is not installed: {_HINT}"
        for package, wanted in _PACKAGES.items():
            try:
                found = metadata.version(package)
            except metadata.PackageNotFoundError:
                return f"{package} is not installed: {_HINT}"
            if not found.startswith(wanted + "."):
                return f"{package} {found} is not the release that works, {wanted}: {_HINT}"
        return None

    def versions(self) -> dict[str, str]:
        """TVM's version and that of its foreign function interface."""
        try:
            return {package: metadata.version(package) for package in _PACKAGES}
        except metadata.PackageNotFoundError:
            raise MissingError(f"TVM is not installed: {_HINT}") from None

    def can_compile(self, target: Target) -> str | None:
        """CPUs, where there is a linker for them, and GPUs of NVIDIA's."""
        reason = self.is_available()
        if reason is not None:
            return reason
        from graphopt.backends import _tvm_link

        return _tvm_link.missing(target)

    def can_run(self, target: Target) -> str | None:
        """Whether this machine has the target's instructions, or a GPU."""
        reason = self.is_available()
        if reason is not None:
            return reason
        if target.device == "cuda":
            from graphopt.backends import _cuda_driver, _tvm_executable

            reason = _tvm_executable.no_gpu()
            return reason or (_cuda_driver.mismatch(target.arch) if target.arch else None)
        if target.device == "cpu":
            return target.foreign()
        return f"no code runs on {target.name}: name a device, such as cpu"

    def supports(
        self, model: ir.Model, target: Target, options: Options | None = None
    ) -> dict[str, str]:
        """Asked of the importer, node by node; shapes that it cannot handle are found as well."""
        self._require(self.is_available())
        from graphopt.backends import _tvm_import

        return _tvm_import.unsupported(model, (options or Options()).sizes())

    def legalize(self, target: Target) -> tuple[Pass, ...]:
        """The passes that rid a model of what the importer cannot take."""
        from graphopt.pass_manager import parse_pipeline

        expand = f"expand-operators{{operators={_LACKING}}},expand-cdist,expand-fourier"
        return tuple(
            parse_pipeline(
                f"convert-opset{{version=13,at_least=true}},inline-functions,{expand},"
                "fold-constants,fold-shapes,eliminate-identity,eliminate-dead"
            )
        )

    def compile(self, model: ir.Model, target: Target, options: Options, folder: Path) -> None:
        """Import, schedule, generate code and link; `kernels.json` tells of each kernel."""
        self._require(self.can_compile(target))
        from graphopt.backends import _tvm_compile

        _tvm_compile.compile_model(model, target, options, folder)

    def remarks(self, folder: Path) -> list[str]:
        """Kernels without a schedule, and products without tiles."""
        from graphopt.backends import _tvm_executable

        return _tvm_executable.remarks(folder)

    def load(self, folder: Path, manifest: Manifest) -> TvmExecutable:
        """The library in TVM's virtual machine; needs neither onnx nor a compiler."""
        from graphopt.backends import _tvm_executable

        reason = self.can_run(manifest.target)
        if reason is not None:
            raise MissingError(f"{folder} cannot run here: {reason}")
        return _tvm_executable.load(folder, manifest, make_options(self, manifest.options))

    @staticmethod
    def _require(reason: str | None) -> None:
        if reason is not None:
            raise MissingError(f"tvm: {reason}")


BACKEND = Tvm()
