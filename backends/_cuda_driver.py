"""The few calls of NVIDIA's driver library that running an engine takes, by ctypes.

Names and conventions are those of the CUDA driver API. Nothing but the driver itself need be
installed.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from graphopt.errors import GraphoptError

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_…


@cache
def _driver() -> ctypes.CDLL | str:
    """The library with a device behind it, or why there is none."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver (libcuda.so.1)"
    if (code := library.cuInit(0)) != 0:
        return f"NVIDIA's driver does not start (error {code})"
    count = ctypes.c_int()
    if library.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "there is no NVIDIA GPU"
    return library


def missing() -> str | None:
    """None, or why no GPU can be used."""
    driver = _driver()
    return driver if isinstance(driver, str) else None


def architecture() -> str:
    """The first GPU's, such as `sm_89`."""
    device = ctypes.c_int()
    _call("cuDeviceGet", ctypes.byref(device), 0)
    digits = ""
    for attribute in (_MAJOR, _MINOR):
        number = ctypes.c_int()
        _call("cuDeviceGetAttribute", ctypes.byref(number), attribute, device)
        digits += str(number.value)
    return f"sm_{digits}"


def mismatch(arch: str) -> str | None:
    """Why machine code for an architecture does not run on the first GPU, or None.

    It runs on those of its major version from its minor version on ("Binary compatibility" of the
    CUDA programming guide).
    """
    there = architecture()
    wanted, found = (int(name.removeprefix("sm_")) for name in (arch, there))
    if wanted // 10 == found // 10 and wanted <= found:
        return None
    return f"it is for {arch} and the GPU here is {there}"


def free_bytes() -> int:
    """Of the first GPU's memory."""
    activate()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    _call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    return int(free.value)


def activate() -> None:
    """Make the first GPU's primary context current in this thread; each thread has its own."""
    _call("cuCtxSetCurrent", _context())


@cache
def _context() -> ctypes.c_void_p:
    """The primary context, kept until the process ends."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _call("cuDeviceGet", ctypes.byref(device), 0)
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    return context


class Memory:
    """Bytes on the GPU; given back with the object. At least one is taken."""

    def __init__(self, size: int) -> None:
        address = ctypes.c_uint64()
        self.size = max(size, 1)
        _call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(self.size))
        self.address = int(address.value)

    def __del__(self) -> None:
        driver = _driver()
        if hasattr(self, "address") and not isinstance(driver, str):
            driver.cuMemFree_v2(ctypes.c_uint64(self.address))

    def write(self, address: int, size: int) -> None:
        """Copy from this process's memory."""
        _call(
            "cuMemcpyHtoD_v2",
            ctypes.c_uint64(self.address),
            ctypes.c_void_p(address),
            ctypes.c_size_t(size),
        )

    def read(self, address: int, size: int) -> None:
        """Copy into this process's memory."""
        _call(
            "cuMemcpyDtoH_v2",
            ctypes.c_void_p(address),
            ctypes.c_uint64(self.address),
            ctypes.c_size_t(size),
        )


class HostMemory:
    """Bytes of this process, with the methods of `Memory`."""

    def __init__(self, size: int) -> None:
        self.size = max(size, 1)
        self._bytes = ctypes.create_string_buffer(self.size)
        self.address = ctypes.addressof(self._bytes)

    def write(self, address: int, size: int) -> None:
        """Copy from elsewhere in this process's memory."""
        ctypes.memmove(self.address, address, size)

    def read(self, address: int, size: int) -> None:
        """Copy to elsewhere in it."""
        ctypes.memmove(address, self.address, size)


class Stream:
    """A queue of work, which waits for the default one, where copies are.

    A copy from pageable memory may go on after its call has returned ("API synchronization
    behavior" of the driver API), so that a stream beside the default one could overtake it.
    """

    def __init__(self) -> None:
        stream = ctypes.c_void_p()
        _call("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(0))
        self.handle = int(stream.value or 0)

    def __del__(self) -> None:
        driver = _driver()
        if hasattr(self, "handle") and not isinstance(driver, str):
            driver.cuStreamDestroy_v2(ctypes.c_void_p(self.handle))

    def wait(self) -> None:
        """Until all of it is done."""
        _call("cuStreamSynchronize", ctypes.c_void_p(self.handle))


class Event:
    """A point in a stream, with its time."""

    def __init__(self) -> None:
        event = ctypes.c_void_p()
        _call("cuEventCreate", ctypes.byref(event), ctypes.c_uint(0))
        self._handle = event

    def __del__(self) -> None:
        driver = _driver()
        if hasattr(self, "_handle") and not isinstance(driver, str):
            driver.cuEventDestroy_v2(self._handle)

    def record(self, stream: Stream) -> None:
        """Put it behind what is in the stream."""
        _call("cuEventRecord", self._handle, ctypes.c_void_p(stream.handle))

    def nanoseconds_since(self, earlier: Event) -> int:
        """Waits for both."""
        _call("cuEventSynchronize", self._handle)
        milliseconds = ctypes.c_float()
        _call("cuEventElapsedTime", ctypes.byref(milliseconds), earlier._handle, self._handle)
        return round(milliseconds.value * 1e6)


def _call(name: str, *arguments: Any) -> None:
    """Call a function of the driver; GraphoptError with its name and code where it fails."""
    driver = _driver()
    if isinstance(driver, str):
        raise GraphoptError(driver)
    code = getattr(driver, name)(*arguments)
    if code != 0:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(code, ctypes.byref(text))
        raise GraphoptError(f"{name}: {(text.value or b'').decode() or code}")
