"""Verification finds planted faults, and says what it could not check."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from graphopt import files, ir
from graphopt.report import Comparison
from graphopt.verification import compare, signature_breaks, verify, verify_changes
from tests._shared import shared
from tests._text import model, proto

Check = Callable[..., Comparison]

NET = """
net (float[n,4] x) => (float[n,4] y) <float[4] w = {1, -2, 3, 0.5}, float one = {1}> {
  a = Mul (x, w)
  b = Add (a, one)
  c = Relu (b)
  y = Softmax <axis = 1> (c)
}
"""

FAULTS = {
    "a constant of another value": ("{1, -2, 3, 0.5}", "{1, -2, 3, 0.51}"),
    "another operator": ("Relu", "LeakyRelu"),
    "another attribute": ("axis = 1", "axis = 0"),
    "a lost term": ("b = Add (a, one)", "b = Identity (a)"),
    "an order that matters": ("Add (a, one)", "Sub (one, a)"),
    "a size taken for fixed": ("c = Relu (b)", "c = Relu (b0)"),
}


def faulty(fault: str) -> str:
    text = NET.replace(*FAULTS[fault])
    if "fixed" in fault:
        shape = "<float[4] w", "<int64[2] s = {2, 4}, float[4] w"
        text = text.replace(*shape).replace("  c =", "  b0 = Reshape (b, s)\n  c =")
    return text


@pytest.mark.parametrize("check", [compare, verify_changes])
def test_a_model_agrees_with_itself(check: Check) -> None:
    found = check(model(NET), model(NET))
    assert found.ok and not found.different and found.worst == 0


@pytest.mark.parametrize("check", [compare, verify_changes])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(check: Check, fault: str) -> None:
    found = check(model(NET), model(faulty(fault)))
    assert found.different and not found.ok, found


def test_figures_of_each_output() -> None:
    found = verify(proto(NET), proto(NET), feeds={"x": np.ones((5, 4), np.float32)})
    (output,) = found.outputs
    assert (output.name, output.dtype, output.shape) == ("y", "FLOAT", (5, 4))
    assert output.top1 == 1 and output.tolerance == 1e-3 and output.sqnr_db is None


def test_several_feeds() -> None:
    feeds = [{"x": np.full((n, 4), n, np.float32)} for n in (1, 3)]
    assert compare(model(NET), model(NET), feeds=feeds).outputs[0].elements == 16


def test_what_cannot_run_is_not_ok() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 20, "vendor" : 1]>
    net (float[2,4] x) => (float[2,4] y, float[2,4] z) {
      y = vendor.Magic (x)
      z = Relu (x)
    }
    """
    same = compare(model(text), model(text))
    assert same.ok and same.how == "regions"  # computed alike: nothing needs to run
    changed = text.replace("y = vendor.Magic (x)", "x2 = Neg (x)\n y = vendor.Magic (x2)")
    found = compare(model(text), model(changed))
    assert not found.ok and not found.different
    assert len(found.unchecked) == 1 and found.unchecked[0].startswith("y:")
    wrong = compare(model(text), model(text.replace("Relu", "Neg")))
    assert wrong.different and wrong.outputs[-1].name == "z"


def test_a_result_that_does_not_run_differs() -> None:
    broken = NET.replace("c = Relu (b)", "t = Transpose <perm = [1, 0]> (b)\n c = Add (b, t)")
    found = compare(model(NET), model(broken))
    assert found.different and "does not run" in found.summary()


def test_random_operators_are_not_checked() -> None:
    text = """
    net (float[64] x) => (float[64] y, float[64] z) {
      r = RandomNormalLike (x)
      y = Add (x, r)
      z = Abs (x)
    }
    """
    found = compare(model(text), model(text.replace("Add (x, r)", "Sub (x, r)")))
    assert not found.ok and not found.different
    assert "y: it depends on the random operator" in found.unchecked[0]
    assert compare(model(text), model(text.replace("Abs", "Neg"))).different


def test_rounding_in_the_original_widens_the_limit() -> None:
    text = """
    net (float[4096] x) => (float[4096] y) <float s = {1e-7}, float big = {1e7}> {
      a = Add (x, big)
      b = Sub (a, big)
      y = Div (b, s)
    }
    """
    late = text.replace("y = Div (b, s)", "t = Reciprocal (s)\n y = Mul (b, t)")
    assert compare(model(text), model(late)).ok


def test_long_sums_of_the_original_widen_the_limit() -> None:
    """ONNX Runtime adds up 160,000 floats one after another: what is nearer to the truth agrees."""
    types = "net (float[1,1,400,400] x) => (float[1,1,400,400] y)"
    instance = "<float[1] s = {1}, float[1] b = {0}> { y = InstanceNormalization (x, s, b) }"
    parts = """<double e = {1e-5}, int64[2] axes = {2, 3}> {
      w = Cast <to = 11> (x)
      m = ReduceMean (w, axes)
      c = Sub (w, m)
      q = Mul (c, c)
      v = ReduceMean (q, axes)
      p = Add (v, e)
      d = Sqrt (p)
      n = Div (c, d)
      y = Cast <to = 1> (n)
    }"""
    image = 3000 + np.random.default_rng(0).standard_normal((1, 1, 400, 400))
    original, exact = (model(f"{types} {body}") for body in (instance, parts))
    (output,) = compare(original, exact, feeds={"x": image.astype(np.float32)}).outputs
    assert output.ok and output.noise is not None
    assert 1e-3 < output.max_rel <= 2 * output.noise < 1e-2


@pytest.mark.parametrize("check", [compare, verify_changes])
def test_outputs_that_hardly_vary_do_not_hide_faults(check: Check) -> None:
    text = """
    net (float[4,8] x) => (float[4,8] y, int64[4] i) <float k = {-40}, float two = {2}> {
      a = Tanh (x)
      b = Mul (a, two)
      c = Add (b, k)
      y = Sigmoid (c)
      m = Mul (c, y)
      r = Relu (m)
      i = ArgMax <axis = 1, keepdims = 0> (r)
    }
    """
    found = check(model(text), model(text.replace("Tanh", "Sin")))
    assert found.different and found.how == "regions"
    assert check(model(text), model(text.replace("b = Mul (a, two)", "b = Add (a, a)"))).ok


def test_ties_of_integer_outputs_follow_the_original() -> None:
    text = """
    net (float[512,2] x) => (int64[512] y) <float k = {3}> {
      a = Div (x, k)
      y = ArgMax <axis = 1, keepdims = 0> (a)
    }
    """
    found = compare(model(text), model(text.replace("ArgMax", "ArgMin")))
    assert found.different and found.outputs[0].max_rel > 0.9


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("float[n,4] x", "float[2,4] x"), "input x has shape [2,4], was"),
        (("=> (float[n,4] y)", "=> (float[n,4] c)"), "outputs lost y and gained c"),
        (("(float[n,4] x)", "(float[n,4] x, float[1] more)"), "inputs gained more"),
    ],
)
def test_signature(change: tuple[str, str], reason: str) -> None:
    (broken,) = signature_breaks(model(NET), model(NET.replace(*change)))
    assert broken.replace(", 4", ",4").startswith(reason)


def test_signature_may_widen_inputs_and_narrow_outputs() -> None:
    fixed = NET.replace("float[n,4] x", "float[2,4] x")
    assert not signature_breaks(model(fixed), model(NET))
    assert not signature_breaks(model(NET), model(NET.replace("(float[n,4] y)", "(float[2,4] y)")))
    assert signature_breaks(model(NET.replace("(float[n,4] y)", "(float[2,4] y)")), model(NET))


def test_types_of_inputs() -> None:
    one = "net (float[2] x) => (float[2] y) { y = Neg (x) }"
    assert "has type" in signature_breaks(model(one), model(one.replace("float", "double")))[0]


def test_order_of_outputs() -> None:
    two = "net (float[2] x) => (float[2] a, float[2] b) { a = Neg (x)\n b = Abs (x) }"
    swapped = two.replace("(float[2] a, float[2] b)", "(float[2] b, float[2] a)")
    assert "order" in signature_breaks(model(two), model(swapped))[0]


def test_within_a_memory_limit_only_regions_run() -> None:
    found = compare(model(NET), model(faulty("another operator")), memory_limit=8)
    assert found.how == "regions" and found.different


def test_half_precision_has_a_wider_limit() -> None:
    half = """
    net (float[8,8] x) => (float[8,8] y) {
      h = Cast <to = 10> (x)
      e = Exp (h)
      y = Cast <to = 1> (e)
    }
    """
    assert compare(model(half), model(half)).outputs[0].tolerance == 1e-2


def test_models_are_left_alone() -> None:
    one, other = proto(NET), proto(faulty("a lost term"))
    before = one.SerializeToString(), other.SerializeToString()
    verify(one, other)
    assert before == (one.SerializeToString(), other.SerializeToString())


@pytest.mark.parametrize(
    "name", ["sk_digits_rf_zipmap", "silero_vad_v6", "mobilenet_v2_10_224_qdq"]
)
def test_models_of_the_corpus_agree_with_themselves(name: str) -> None:
    path = shared(f"corpus/models/{name}/model.onnx")
    one = files.load(path)
    assert compare(one, files.copy(one)).ok


def test_int_and_text_inputs() -> None:
    text = """
    net (string[n] s, int64[n] i) => (string[n] t, int64[n] j) <int64 two = {2}> {
      t = Identity (s)
      j = Mul (i, two)
    }
    """
    assert compare(model(text), model(text)).ok
    found = compare(model(text), model(text.replace("Mul", "Add")))
    assert found.different and [o.ok for o in found.outputs] == [True, False]
    assert isinstance(model(text), ir.Model)
