"""Running an engine, against stand-ins for TensorRT's engine and NVIDIA's driver.

The engine computes in this process's memory, by the addresses that it is given: what is bound
where, which shapes it is told, and what it asks for are as in TensorRT's interface.
"""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from graphopt.artifact import TensorInfo
from graphopt.backends import Array, _cuda_driver, _tensorrt_executable
from graphopt.backends._tensorrt_executable import TensorrtExecutable
from graphopt.errors import GraphoptError, InputError
from tests.test_cuda_driver import Driver

INPUTS = (TensorInfo("x", "float32", ("n", 2)), TensorInfo("k", "int64", ()))
OUTPUTS = (TensorInfo("y", "float32", ("n", 2)), TensorInfo("above", "float32", ("m",)))
DRIVER = Driver()
"""One for all tests: what is freed late is freed where it was taken."""


class Context:
    """y = x * k, and of x what is above zero, whose number is known only then."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.allocator: Any = None
        self.profiler: Any = None
        self.fails = False

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """Rows may be 1 to 4."""
        self.shapes[name] = tuple(shape)
        return name != "x" or 1 <= shape[0] <= 4

    def set_tensor_address(self, name: str, address: int) -> bool:
        """Where a tensor is."""
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """-1 is for what the data decides."""
        return {"y": self.shapes["x"], "above": (-1,)}.get(name) or self.shapes[name]

    def set_output_allocator(self, name: str, allocator: Any) -> bool:
        """Asked for memory while it runs."""
        assert name == "above"
        self.allocator = allocator
        return True

    def execute_async_v3(self, stream: int) -> bool:
        """All of it, at once."""
        if self.fails:
            return False
        x = self._array("x", np.float32, self.shapes["x"])
        k = self._array("k", np.int64, self.shapes["k"])
        self._array("y", np.float32, x.shape)[...] = x * k
        above = x[x > 0]
        address = self.allocator.reallocate_output_async("above", 0, above.nbytes, 256, stream)
        self.addresses["above"] = address
        self._array("above", np.float32, above.shape)[...] = above
        self.allocator.notify_shape("above", above.shape)
        if self.profiler is not None:
            self.profiler.report_layer_time("mul (kernel)", 0.5)
        return True

    def _array(self, name: str, dtype: Any, shape: tuple[int, ...]) -> Array:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if not size:
            return np.empty(shape, dtype)
        memory = ctypes.cast(self.addresses[name], ctypes.POINTER(ctypes.c_uint8))
        return np.ctypeslib.as_array(memory, (size,)).view(dtype).reshape(shape)


class Base:
    """A class of the library's that is derived from."""


@pytest.fixture
def contexts(monkeypatch: pytest.MonkeyPatch) -> list[Context]:
    """Filled with the contexts that are made."""
    made: list[Context] = []

    def create_execution_context() -> Context:
        made.append(Context())
        return made[-1]

    locations = SimpleNamespace(HOST="host", DEVICE="device")

    def get_tensor_location(name: str) -> str:
        return "host" if name == "k" else "device"

    engine = SimpleNamespace(
        create_execution_context=create_execution_context,
        get_tensor_location=get_tensor_location,
    )

    def deserialize(data: bytes) -> Any:
        return engine if data == b"engine" else None

    def start(_: object) -> Any:
        return runtime

    runtime = SimpleNamespace(deserialize_cuda_engine=deserialize)
    library = SimpleNamespace(
        Runtime=start,
        TensorLocation=locations,
        IOutputAllocator=Base,
        IProfiler=Base,
    )
    log = SimpleNamespace(logger=None, take=list[str])
    monkeypatch.setattr(_tensorrt_executable, "library", lambda: library)
    monkeypatch.setattr(_tensorrt_executable, "log", lambda: log)
    monkeypatch.setattr(_cuda_driver, "_driver", lambda: DRIVER)
    return made


def load(folder: Path, data: bytes = b"engine") -> TensorrtExecutable:
    """An engine file with the signature of `Context`."""
    path = folder / "model.engine"
    path.write_bytes(data)
    manifest: Any = SimpleNamespace(inputs=INPUTS, outputs=OUTPUTS)
    return TensorrtExecutable(path, manifest)


def feeds(rows: int) -> dict[str, Array]:
    """Inputs of a size; not contiguous, and a scalar."""
    x = np.arange(2 * rows, dtype=np.float32).reshape(2, rows).T - 1
    return {"x": x, "k": np.array(3, np.int64)}


@pytest.mark.usefixtures("contexts")
def test_results(tmp_path: Path) -> None:
    executable = load(tmp_path)
    for rows in (3, 1, 4):
        given = feeds(rows)
        found = executable.run(given)
        np.testing.assert_array_equal(np.asarray(found["y"]), given["x"] * 3)
        np.testing.assert_array_equal(np.asarray(found["above"]), given["x"][given["x"] > 0])


@pytest.mark.usefixtures("contexts")
def test_memory_is_given_back_at_once(tmp_path: Path) -> None:
    executable, held = load(tmp_path), len(DRIVER.held)
    gc.disable()
    try:
        executable.run(feeds(3))
        assert len(DRIVER.held) == held
    finally:
        gc.enable()


def test_shapes_are_computed_from_values_in_this_process(
    contexts: list[Context], tmp_path: Path
) -> None:
    load(tmp_path).run(feeds(2))
    assert contexts[0].shapes["k"] == ()
    assert contexts[0].addresses["k"] not in DRIVER.held


@pytest.mark.usefixtures("contexts")
def test_times_are_the_devices(tmp_path: Path) -> None:
    times = load(tmp_path).benchmark(feeds(2), 3)
    assert times.tolist() == [1_500_000] * 3


def test_a_profile_is_taken_in_a_context_of_its_own(
    contexts: list[Context], tmp_path: Path
) -> None:
    (row,) = load(tmp_path).profile(feeds(2), 4)
    assert (row.op, row.calls, row.microseconds) == ("mul", 1.0, 500.0)
    assert contexts[0].profiler is None


@pytest.mark.usefixtures("contexts")
def test_an_engine_that_does_not_load(tmp_path: Path) -> None:
    with pytest.raises(GraphoptError, match="does not load the engine: it does not say why"):
        load(tmp_path, b"of another GPU")


@pytest.mark.usefixtures("contexts")
def test_sizes_outside_of_the_ranges(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"input 'x' of \[5, 2\]: it is out of the ranges"):
        load(tmp_path).run(feeds(5))


def test_a_run_that_fails(contexts: list[Context], tmp_path: Path) -> None:
    executable = load(tmp_path)
    contexts[0].fails = True
    with pytest.raises(GraphoptError, match="the run failed: it does not say why"):
        executable.run(feeds(2))
