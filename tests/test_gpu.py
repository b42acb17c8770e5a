"""What a machine with an NVIDIA GPU runs, for every backend that is installed there.

Results against the CPU, latency, memory. Elsewhere all of it is skipped with the reason;
`tests/gpu_check.py` runs it and keeps the figures.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from graphopt import backends, compilation, files, models
from graphopt.backends import Array, Backend, _cuda_driver
from graphopt.feeds import workable_feeds
from graphopt.runner import Runner
from graphopt.shapes import Shapes
from graphopt.target import Target
from graphopt.timing import Latency

pytestmark = pytest.mark.gpu
BATCHES = (1, 8)
RUNS = 200

Record = Callable[[str, object], None]


@pytest.fixture(params=backends.names())
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend that compiles for the GPU that is here and runs on it."""
    reason = _cuda_driver.missing()
    if reason is not None:
        pytest.skip(reason)
    found = backends.get(request.param)
    target = here()
    reason = found.can_compile(target) or found.can_run(target)
    if reason is not None:
        pytest.skip(f"{found.name}: {reason}")
    return found


def here() -> Target:
    """The GPU of this machine."""
    name = f"cuda:{_cuda_driver.architecture()}"
    return Target.parse(name if name in Target.names() else "cuda")


def feeds_of(name: str, batch: int) -> dict[str, Array]:
    """Random inputs of a batch."""
    model = files.load(models.path(name))
    shapes = Shapes(model)
    firsts = [dims[0] for v in model.graph.inputs if (dims := shapes.shape(v))]
    free = {str(dim): batch for dim in firsts if not isinstance(dim, int)}
    return workable_feeds(model, shapes, bindings=free)


@pytest.mark.parametrize("name", ["digits_cnn", "digits_transformer"])
def test_it_agrees_with_the_cpu(
    backend: Backend,
    name: str,
    tmp_path: Path,
    record_property: Record,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # cuBLAS and cuDNN multiply with 10 bits of mantissa otherwise, and the bounds are for 23
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    small, large = (feeds_of(name, batch) for batch in BATCHES)
    options: dict[str, object] = {}
    known = backends.describe_options(backend)
    if "shapes" in known:
        options["shapes"] = ",".join(
            f"{key}={'/'.join('x'.join(map(str, f[key].shape)) for f in (small, small, large))}"
            for key in small
        )
    if "tf32" in known:
        options["tf32"] = False
    folder = compilation.compile(
        models.path(name), here(), tmp_path / "a", backend=backend.name, options=options
    )
    free = _cuda_driver.free_bytes()
    executable = compilation.load(folder)
    reference = Runner(models.path(name))
    for batch, feeds in zip(BATCHES, (small, large), strict=True):
        found = executable.run(feeds)
        for output, expected in reference.run(feeds).items():
            np.testing.assert_allclose(
                np.asarray(found[output]), expected, rtol=1e-3, atol=1e-4, err_msg=output
            )
        executable.benchmark(feeds, RUNS // 4)
        latency = Latency.of(executable.benchmark(feeds, RUNS))
        record_property(f"p50_ms_batch_{batch}", latency.p50_ms)
        record_property(f"p99_ms_batch_{batch}", latency.p99_ms)
    record_property("device_memory_bytes", free - _cuda_driver.free_bytes())
    record_property("versions", backend.versions())
    assert executable.profile(small, 3)
    again = executable.run(small)  # a profile leaves nothing behind
    for output, expected in reference.run(small).items():
        np.testing.assert_allclose(np.asarray(again[output]), expected, rtol=1e-3, atol=1e-4)


def test_an_artifact_of_another_gpu_is_refused(backend: Backend, tmp_path: Path) -> None:
    others = [name for name in Target.names() if name.startswith("cuda:sm_")]
    for name in others:
        target = Target.parse(name)
        if backend.can_compile(target) is None and backend.can_run(target) is not None:
            assert str(backend.can_run(target))
            return
    pytest.skip(f"{backend.name} has nothing that is for one GPU only")
