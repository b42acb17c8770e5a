"""TVM on a GPU that is emulated: the same kernels, libraries and calls as on a real one."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from graphopt import backends, files, npz
from graphopt.backends import Array, _tvm_cuda
from graphopt.errors import GraphoptError, MissingError
from graphopt.feeds import workable_feeds
from graphopt.runner import Runner
from graphopt.shapes import Shapes
from graphopt.target import Target
from tests.cuda import emulator

BACKEND = backends.get("tvm")
UNAVAILABLE = BACKEND.is_available()
MISSING = UNAVAILABLE or emulator.missing()
needs_tvm = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))
emulated = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
EMULATED = Path(__file__).with_name("emulated.py")
HEADER = '<ir_version: 9, opset_import: ["": 18]> '


def weight(*shape: int, dtype: Any = np.float32) -> Array:
    """Small numbers, the same each time."""
    array: Array = (np.random.default_rng(sum(shape)).standard_normal(shape) * 0.3).astype(dtype)
    return array


def model(text: str, **weights: Array) -> onnx.ModelProto:
    """A model from its text and its weights, which the text has as inputs."""
    made = parser.parse_model(HEADER + text)
    inputs = [value for value in made.graph.input if value.name not in weights]
    del made.graph.input[:]
    made.graph.input.extend(inputs)
    made.graph.initializer.extend(numpy_helper.from_array(w, name) for name, w in weights.items())
    return made


def image() -> onnx.ModelProto:
    """Convolutions of each kind, pools, a product with a vector, and a long sum."""
    text = """g (float[1,3,17,17] x, float[] a, float[] b, float[] c, float[] d)
        => (float[1,70] y, float[1,16,1,1] m) {
        p = Conv<strides=[2,2], pads=[1,1,1,1]>(x, a)
        q = Relu(p)
        r = Conv<group=16, pads=[1,1,1,1]>(q, b)
        s = Clip(r, lo, hi)
        t = Conv(s, c)
        u = Add(t, q)
        v = MaxPool<kernel_shape=[3,3], strides=[2,2]>(u)
        m = GlobalAveragePool(u)
        w = Flatten(v)
        y = Gemm(w, d)
    }"""
    bounds = {"lo": np.float32(0), "hi": np.float32(6)}
    weights = {"a": weight(16, 3, 3, 3), "b": weight(16, 1, 3, 3), "c": weight(16, 16, 1, 1)}
    return model(text, **weights, d=weight(256, 70), **{k: np.array(v) for k, v in bounds.items()})


def sentence() -> onnx.ModelProto:
    """Free sizes: rows that are looked up, attention, a norm, functions, a scalar, a place."""
    text = """g (int64[batch,seq] ids, float one,
           float[] table, float[] q, float[] k, float[] scale)
        => (float[batch,seq,24] y, int64[batch,seq] best, float[batch,24] mean) {
        x = Gather(table, ids)
        a = MatMul(x, q)
        b = MatMul(x, k)
        bt = Transpose<perm=[0,2,1]>(b)
        scores = MatMul(a, bt)
        p = Softmax<axis=-1>(scores)
        c = MatMul(p, x)
        n = LayerNormalization(c, scale)
        e = Erf(n)
        t = Tanh(e)
        u = Mul(t, one)
        y = Add(u, x)
        best = ArgMax<axis=-1, keepdims=0>(y)
        mean = ReduceMean<keepdims=0>(y, ax)
    }"""
    weights = {"table": weight(50, 24), "q": weight(24, 24), "k": weight(24, 24)}
    return model(text, **weights, scale=weight(24), ax=np.array([1]))


def half() -> onnx.ModelProto:
    """float16, summed up in float32."""
    text = """g (float16[4,24] x, float16[] w) => (float16[4,16] y, float16[4] s) {
        a = MatMul(x, w)
        y = Softmax<axis=-1>(a)
        q = Mul(x, x)
        s = ReduceSum<keepdims=0>(q, ax)
    }"""
    return model(text, w=weight(24, 16, dtype=np.float16), ax=np.array([1]))


def quantized() -> onnx.ModelProto:
    """An int8 convolution between QuantizeLinear and DequantizeLinear."""
    text = """g (float[1,8,9,9] x, float s, int8 z, int8[] w, float[] ws, float[] bias)
        => (float[1,16,9,9] y) {
        xq = QuantizeLinear(x, s, z)
        xd = DequantizeLinear(xq, s, z)
        wd = DequantizeLinear<axis=0>(w, ws)
        c = Conv<pads=[1,1,1,1]>(xd, wd, bias)
        r = Relu(c)
        rq = QuantizeLinear(r, s, z)
        y = DequantizeLinear(rq, s, z)
    }"""
    integers = np.random.default_rng(0).integers(-127, 128, (16, 8, 3, 3)).astype(np.int8)
    scales = {"s": np.array(0.05, np.float32), "ws": np.full(16, 0.002, np.float32)}
    return model(text, **scales, z=np.array(0, np.int8), w=integers, bias=weight(16))


def places() -> onnx.ModelProto:
    """Kernels that share themselves out to threads: scattering and sorting."""
    text = """g (float[3,4] x, int64[] at, float[] u, int64[] two)
        => (float[3,4] y, float[3,2] v, int64[3,2] i) {
        y = ScatterElements(x, at, u)
        v, i = TopK(x, two)
    }"""
    return model(text, at=np.array([[2, 0, 1, 2]]), u=weight(1, 4), two=np.array([2]))


MODELS = {
    "image": (image, 1e-4),
    "sentence": (sentence, 1e-4),
    "half": (half, 5e-3),
    "places": (places, 0.0),
    "quantized": (quantized, 0.0501),  # a step
}


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the emulated GPU's libraries."""
    folder = tmp_path_factory.mktemp("cuda")
    emulator.build(folder)
    return folder


def python(gpu: Path, *arguments: object, there: bool = True) -> str:
    """What a Python program prints on a machine with the GPU, or with its compiler only."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, **emulator.environment(gpu, gpu=there)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@emulated
@pytest.mark.slow
def test_kernels_compute_what_the_model_does(gpu: Path, tmp_path: Path) -> None:
    for name, (make, _) in MODELS.items():
        made = files.load(make())
        files.save(made, tmp_path / f"{name}.onnx")
        sizes = {"batch": 2, "seq": 7}
        npz.write(tmp_path / f"{name}.npz", workable_feeds(made, Shapes(made), bindings=sizes))
    python(gpu, EMULATED, "compile", tmp_path, there=False)
    python(gpu, EMULATED, "run", tmp_path)
    for name, (_, tolerance) in MODELS.items():
        found, times, rows = pickle.loads((tmp_path / f"{name}.out").read_bytes())
        feeds = npz.read(tmp_path / f"{name}.npz")
        for output, expected in Runner(tmp_path / f"{name}.onnx").run(feeds).items():
            np.testing.assert_allclose(
                np.asarray(found[output], np.float64),
                np.asarray(expected, np.float64),
                rtol=tolerance,
                atol=tolerance,
                err_msg=f"{name} {output}",
            )
        assert (times > 0).all()
        assert {device for _, device in rows} == {"cuda:0"}


@emulated
def test_an_artifact_for_another_gpu(gpu: Path) -> None:
    code = (
        "from graphopt import backends; from graphopt.target import Target\n"
        "for name in ('cuda', 'cuda:sm_80', 'cuda:sm_86', 'cuda:sm_89', 'cuda:sm_90'):\n"
        "    print(backends.get('tvm').can_run(Target.parse(name)))"
    )
    *runs, last = python(gpu, "-c", code).splitlines()
    assert runs == ["None"] * 4
    assert last == "it is for sm_90 and the GPU here is sm_89"


SOURCE = """
#include <cuda_fp16.h>
#ifdef __CUDACC_RTC__
#include <cuda/std/cstdint>
#endif
extern "C" __global__ void twice(half* x) { x[threadIdx.x] = x[threadIdx.x] + x[threadIdx.x]; }
"""


@needs_tvm
def test_cuda_source_is_compiled_by_what_is_installed() -> None:
    reason = _tvm_cuda.missing_compiler()
    if reason is not None:
        pytest.skip(reason)
    assert _tvm_cuda.machine_code(SOURCE, "sm_89").startswith(b"\x7fELF")
    anywhere = _tvm_cuda.machine_code(SOURCE, "")
    assert anywhere.startswith(b"//")  # what TVM tells PTX by
    assert b".target sm_75" in anywhere
    assert anywhere.endswith(b"\0")
    with pytest.raises(GraphoptError, match=r"(nvcc|NVRTC): .*error"):
        _tvm_cuda.machine_code(SOURCE.replace("half* x", "nothing* x"), "sm_89")


@needs_tvm
def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tvm_cuda, "_nvrtc", lambda: None)
    monkeypatch.setattr(_tvm_cuda, "_nvcc", lambda: None)
    reason = BACKEND.can_compile(Target.parse("cuda:sm_89"))
    assert reason == "no compiler for CUDA (NVRTC or nvcc): pip install 'graphopt[tvm-cuda]'"
    with pytest.raises(MissingError, match="no compiler for CUDA"):
        _tvm_cuda.machine_code(SOURCE, "sm_89")
