"""The calls of NVIDIA's driver, against a stand-in that keeps its memory in this process."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from graphopt.backends import _cuda_driver
from graphopt.backends._cuda_driver import Event, HostMemory, Memory, Stream
from graphopt.errors import GraphoptError


class Driver:
    """As `libcuda.so.1` behaves on a machine with one GPU of compute capability 8.9."""

    def __init__(self) -> None:
        self.held: dict[int, Any] = {}
        self.calls: list[str] = []
        self.room = 1 << 20

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            self.calls.append(name)
            return 0

        return call

    def cuDeviceGetAttribute(self, number: Any, attribute: int, device: Any) -> int:
        number._obj.value = {75: 8, 76: 9}[attribute]
        return 0

    def cuMemAlloc_v2(self, address: Any, size: Any) -> int:
        if size.value > self.room:
            return 2
        buffer = ctypes.create_string_buffer(size.value)
        address._obj.value = ctypes.addressof(buffer)
        self.held[ctypes.addressof(buffer)] = buffer
        return 0

    def cuMemFree_v2(self, address: Any) -> int:
        del self.held[address.value]
        return 0

    def cuMemcpyHtoD_v2(self, to: Any, source: Any, size: Any) -> int:
        ctypes.memmove(to.value, source.value, size.value)
        return 0

    def cuMemcpyDtoH_v2(self, to: Any, source: Any, size: Any) -> int:
        ctypes.memmove(to.value, source.value, size.value)
        return 0

    def cuEventElapsedTime(self, time: Any, first: Any, last: Any) -> int:
        time._obj.value = 1.5
        return 0

    def cuGetErrorString(self, code: int, text: Any) -> int:
        text._obj.value = b"out of memory"
        return 0

    def cuMemGetInfo_v2(self, free: Any, total: Any) -> int:
        free._obj.value = self.room
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """The stand-in."""
    made = Driver()
    monkeypatch.setattr(_cuda_driver, "_driver", lambda: made)
    return made


def test_the_device(driver: Driver) -> None:
    assert _cuda_driver.missing() is None
    assert _cuda_driver.architecture() == "sm_89"
    assert _cuda_driver.free_bytes() == driver.room
    assert "cuCtxSetCurrent" in driver.calls


def test_memory_of_this_process_is_used_alike() -> None:
    given, back = np.arange(10, dtype=np.int64), np.empty(10, np.int64)
    memory = HostMemory(given.nbytes)
    memory.write(given.ctypes.data, given.nbytes)
    memory.read(back.ctypes.data, back.nbytes)
    np.testing.assert_array_equal(given, back)


def test_memory_goes_there_and_back_and_is_freed(driver: Driver) -> None:
    given, back = np.arange(10, dtype=np.float32), np.empty(10, np.float32)
    memory = Memory(given.nbytes)
    memory.write(given.ctypes.data, given.nbytes)
    memory.read(back.ctypes.data, back.nbytes)
    np.testing.assert_array_equal(given, back)
    assert len(driver.held) == 1
    del memory
    assert driver.held == {}
    assert Memory(0).size == 1


def test_what_fails_is_one_line(driver: Driver) -> None:
    with pytest.raises(GraphoptError, match="cuMemAlloc_v2: out of memory"):
        Memory(1 << 30)


def test_time_between_events(driver: Driver) -> None:
    stream, first, last = Stream(), Event(), Event()
    first.record(stream)
    last.record(stream)
    assert last.nanoseconds_since(first) == 1_500_000
    stream.wait()
    assert driver.calls[-1] == "cuStreamSynchronize"


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda_driver, "_driver", lambda: "there is no NVIDIA GPU")
    assert _cuda_driver.missing() == "there is no NVIDIA GPU"
    with pytest.raises(GraphoptError, match="there is no NVIDIA GPU"):
        _cuda_driver.architecture()
