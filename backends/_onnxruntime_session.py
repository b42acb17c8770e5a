"""ONNX Runtime's package: its providers and what they need, its sessions and its errors."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any

from graphopt.errors import GraphoptError, MissingError

PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
    "openvino": ("OpenVINOExecutionProvider", "CPUExecutionProvider"),
}
"""In order of preference: a node goes to the first that takes it."""
MEMORY = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "cuda"}
"""Where providers have memory of their own."""
_WHEELS = {
    "cuda": "'onnxruntime-gpu[cuda,cudnn]'",
    "tensorrt": "'onnxruntime-gpu[cuda,cudnn]' tensorrt",
    "openvino": "onnxruntime-openvino",
}
_FATAL = 4  # log severity


def ort() -> Any:
    """The onnxruntime package (untyped), imported on first use."""
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise MissingError(
            f"onnxruntime is not usable ({error}): pip install onnxruntime"
        ) from None


@cache
def errors() -> tuple[type[Exception], ...]:
    """Everything that ONNX Runtime raises: its own classes have no common base."""
    state: dict[str, Any] = ort().capi.onnxruntime_pybind11_state.__dict__
    own = (k for k in state.values() if isinstance(k, type) and issubclass(k, Exception))
    return (*own, RuntimeError, ValueError, TypeError)


def failure(error: Exception) -> GraphoptError:
    """An error of ONNX Runtime's as one line, without its codes and source positions."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ", "", str(error))
    text = re.sub(r"/onnxruntime_src/\S+?:\d+ |^\w+\.cc:\d+ ", "", text)
    text = text.rpartition("[OpenVINO-EP] ")[2]  # behind the names of C++ functions
    return GraphoptError(" ".join(text.split())[:600])


def lacks(name: str) -> str | None:
    """Why a provider cannot run here, and what to install; or None.

    Of one for GPUs, whether its wheel and the driver are there: `make_session` tells the rest.
    """
    provider, there = PROVIDERS[name][0], ort().get_available_providers()
    if provider not in there:
        hint = f": pip install {_WHEELS[name]}" if name in _WHEELS else ""
        return f"this onnxruntime has no {provider}, only {', '.join(there)}{hint}"
    if provider not in MEMORY:
        return None
    from graphopt.backends import _cuda_driver

    return _cuda_driver.missing()


def make_session(model: Path | bytes, settings: Any, name: str, tf32: bool = False) -> Any:
    """A session whose nodes go to a provider as far as it takes them.

    Args:
        model: a file, or a serialized model.
        settings: session options.
        name: a key of `PROVIDERS`.
        tf32: let NVIDIA's GPUs multiply float32 with 10 bits of mantissa.

    Raises:
        GraphoptError: ONNX Runtime refuses the model; one line.
        MissingError: the provider is in the wheel, but does not start here.
    """
    source = str(model) if isinstance(model, Path) else model
    chosen, there = PROVIDERS[name], ort().get_available_providers()
    on_gpu = chosen[0] in MEMORY
    if name != "cpu":  # what these log is in the exception too, or no concern of the user's
        ort().set_default_logger_severity(_FATAL)
    if on_gpu:
        _load_libraries()
    options = [
        (each, {"use_tf32": str(int(tf32))}) if each == "CUDAExecutionProvider" else each
        for each in chosen
        if each in there
    ]
    try:  # without the fallback it prints, and goes on with other providers
        made = ort().InferenceSession(source, settings, providers=options, enable_fallback=0)
    except errors() as error:
        if on_gpu and "install" in str(error):
            raise _does_not_start(name) from None
        raise failure(error) from None
    if chosen[0] not in made.get_providers():
        raise _does_not_start(name)
    return made


def _does_not_start(name: str) -> MissingError:
    provider = PROVIDERS[name][0]
    needs = "its libraries"
    if provider in MEMORY:
        needs = f"NVIDIA's driver, CUDA {getattr(ort(), 'cuda_version', '')} and cuDNN"
    hint = f": pip install {_WHEELS[name]}" if name in _WHEELS else ""
    return MissingError(f"onnxruntime's {provider} does not start here: it needs {needs}{hint}")


@cache
def _load_libraries() -> None:
    """Load CUDA's libraries from NVIDIA's wheels: no loader looks for them there.

    What is missing it prints at length; `make_session` says it in one line.
    """
    preload: Any = getattr(ort(), "preload_dlls", None)  # from 1.21 on
    if preload is None:
        return
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        preload()
