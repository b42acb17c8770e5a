"""Shape inference: what it finds, and that what it claims is what a run gives."""

from __future__ import annotations

import time

import numpy as np
import onnx.parser
import pytest

from graphopt import ir
from graphopt.dims import Dim
from graphopt.errors import InputError
from graphopt.shapes import Shapes

from ._agreement import Everything, agreement


def model(text: str, opset: int = 18) -> ir.Model:
    if not text.lstrip().startswith("<"):
        text = f'<ir_version: 10, opset_import: ["": {opset}, "com.microsoft": 1]> {text}'
    return ir.from_proto(onnx.parser.parse_model(text))


def value(of: ir.Model, name: str) -> ir.Value:
    results = (v for node in ir.all_nodes(of) for v in node.outputs)
    return next(v for v in (*of.graph.inputs, *results) if v.name == name)


def shown(text: str, *, opset: int = 18, output: str = "y") -> str:
    """The inferred shape of an output, as text."""
    found = model(text, opset)
    shape = Shapes(found).shape(value(found, output))
    return "?" if shape is None else ", ".join(map(str, shape))


ONE_LINE: list[tuple[str, str]] = [
    ("g (float[b,s] x, float[s] w) => (float y) { y = Add(x, w) }", "b, s"),
    ("g (float[b,s] x, float[t] w) => (float y) { y = Add(x, w) }", "b, broadcast(s, t)"),
    ("g (float[b,s] x, float[4] w) => (float y) { y = Add(x, w) }", "b, 4"),
    ("g (float[b,s,k] x, float[k,8] w) => (float y) { y = MatMul(x, w) }", "b, s, 8"),
    ("g (float[k] x, float[b,k,n] w) => (float y) { y = MatMul(x, w) }", "b, n"),
    ("g (float[m,k] a, float[n,k] c) => (float y) { y = Gemm<transB=1>(a, c) }", "m, n"),
    (
        "g (float[b,3,h,w] x, float[8,3,3,3] k) => (float y) "
        "{ y = Conv<strides=[2,2],pads=[1,1,1,1]>(x, k) }",
        "b, 8, ((h + 1)//2), ((w + 1)//2)",
    ),
    (
        "g (float[b,3,h,w] x, float[8,3,3,3] k) => (float y) "
        '{ y = Conv<strides=[2,2],auto_pad="SAME_UPPER">(x, k) }',
        "b, 8, ((h + 1)//2), ((w + 1)//2)",
    ),
    (
        "g (float[b,3,h] x, float[8,3,3] k) => (float y) { y = Conv<dilations=[2]>(x, k) }",
        "b, 8, h - 4",
    ),
    (
        "g (float[b,3,h] x, float[3,8,4] k) => (float y) "
        "{ y = ConvTranspose<strides=[2],pads=[1,1]>(x, k) }",
        "b, 8, 2*h",
    ),
    (
        "g (float[b,3,h] x) => (float y) { y = MaxPool<kernel_shape=[3],strides=[2]>(x) }",
        "b, 3, ((h + 1)//2) - 1",
    ),
    ("g (float[b,2,h] x) => (float y) { y = Flatten(x) }", "b, 2*h"),
    ("g (float[b,2,h] x) => (float y) { y = ReduceMean<keepdims=0>(x) }", ""),
    ("g (float[b,2,h] x) => (float y) { y = Transpose<perm=[2,0,1]>(x) }", "h, b, 2"),
    ("g (float[b,2] x, float[b,h] z) => (float y) { y = Concat<axis=1>(x, z) }", "b, h + 2"),
    ("g (float[b,h] x) => (float z, float y) { z, y = Split<axis=1,num_outputs=2>(x) }",
     "b, -((h + 1)//2) + h"),
    ('g (float[b,i] x, float[i,o] w) => (float y) { y = Einsum<equation="bi,io->bo">(x, w) }',
     "b, o"),
    ("g (float[b,h] x) => (float y, int64 i) <int64[1] k = {3}> { y, i = TopK(x, k) }", "b, 3"),
    ("g (float[b,h] x) => (int64 y) { y = NonZero(x) }", "2, ?0"),
    ("g (float[s,b,4] x, float[1,24,4] w, float[1,24,6] r) => (float y) "
     "{ y = LSTM<hidden_size=6>(x, w, r) }", "s, 1, b, 6"),
    ("g (float[b,8,h,w] x) => (float y) { y = DepthToSpace<blocksize=2>(x) }", "b, 2, 2*h, 2*w"),
    ("g (float[b,h] x) => (float y) <float[2] s = {1.0, 0.5}> { y = Resize(x, , s) }",
     "b, (h//2)"),
    ("g (float[b,h] x) => (float y) <int64[4] p = {0, 1, 0, 2}> { y = Pad(x, p) }", "b, h + 3"),
    ("g (float[b,h] x) => (float y) <int64[2] r = {1, 3}> { y = Tile(x, r) }", "b, 3*h"),
    ("g (float[b,h] x) => (float y) { y = com.microsoft.FastGelu(x) }", "b, h"),
    ("g (float[b,h] x) => (float[4,q] y) { y = com.microsoft.NoSuchOp(x) }", "4, q"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), ONE_LINE)
def test_one_operator(text: str, expected: str) -> None:
    assert shown(text) == expected


SPLIT_HEADS = """g (float[b,s,768] x) => (float y) {
    shape = Shape(x)
    zero = Constant<value_int = 0>()
    one = Constant<value_int = 1>()
    first = Constant<value_ints = [0]>()
    rest = Constant<value_ints = [12, -1]>()
    batch = Gather(shape, zero)
    steps = Gather(shape, one)
    b1 = Unsqueeze(batch, first)
    s1 = Unsqueeze(steps, first)
    target = Concat<axis=0>(b1, s1, rest)
    r = Reshape(x, target)
    t = Transpose<perm=[0,2,1,3]>(r)
    y = ReduceSum<keepdims=0>(t, one)
}"""


def test_values_are_followed_into_shapes() -> None:
    found = model(SPLIT_HEADS, 18)
    shapes = Shapes(found)
    assert shown(SPLIT_HEADS, output="t") == "b, 12, s, 64"
    target = shapes.values(value(found, "target"))
    assert target is not None and target.tolist() == [Dim.symbol("b"), Dim.symbol("s"), 12, -1]
    assert shapes.size(value(found, "t")) == Dim.symbol("b") * Dim.symbol("s") * 768
    assert not shapes.is_static(value(found, "t")) and shapes.is_static(value(found, "shape"))


def test_expand_pattern_of_exporters() -> None:
    text = """g (float[b,1] x, float[b,s] z) => (float y) {
        shape = Shape(z)
        minus = Constant<value_int = -1>()
        ones = Constant<value_ints = [1, 1]>()
        keeps = Equal(shape, minus)
        target = Where(keeps, ones, shape)
        y = Expand(x, target)
    }"""
    assert shown(text) == "b, s"


def test_an_unknown_element_is_no_size() -> None:
    text = """g (float[b,12] x, int64[1] n) => (float y) <int64[1] m = {4}> {
        target = Concat<axis=0>(n, m)
        y = Reshape(x, target)
    }"""
    assert shown(text) == "3*b, 4", "whatever n asks for, 4 columns leave that many rows"
    found = model(text)
    assert Shapes(found).values(value(found, "target")) is None


def test_symbols_merge_only_on_proof() -> None:
    added = "g (float[b,s] x, float[c,s] z) => (float y) { y = Add(x, z) }"
    assert shown(added) == "broadcast(b, c), s", "either may be 1"
    joined = "g (float[b,s] x, float[c,s] z) => (float y) { y = Concat<axis=1>(x, z) }"
    assert shown(joined) == "b, 2*s"
    assert shown(joined, output="z") == "b, s", "Concat fails unless b and c are equal"
    product = "g (float[b,s] x, float[768,4] z) => (float y) { y = MatMul(x, z) }"
    assert shown(product, output="x") == "b, 768"


def test_no_merging_in_a_branch_that_may_not_run() -> None:
    text = """g (bool c, float[b,s] x, float[d,s] z) => (float y) {
        y = If(c) <
            then_branch = a () => (float p) { p = Concat<axis=1>(x, z) },
            else_branch = e () => (float q) { q = Identity(x) }
        >
    }"""
    assert shown(text) == "b, ?0"
    assert shown(text, output="z") == "d, s"


def test_a_known_condition_takes_its_branch() -> None:
    text = """g (float[b,s] x) => (float y) <bool c = {1}> {
        y = If(c) <
            then_branch = a () => (float p) { p = Concat<axis=1>(x, x) },
            else_branch = e () => (float q) { q = Identity(x) }
        >
    }"""
    assert shown(text) == "b, 2*s"


def test_bodies_of_unknown_operators_are_inferred() -> None:
    text = """g (float[b,s] x) => (float y) {
        y = com.microsoft.NoSuchOp(x) <body = a (float u) => (float p) { p = Shape(x) }>
    }"""
    assert shown(text, output="p") == "2"


LOOP = """g (float[b,s] x, float[b,2] z, int64 n) => (float y, float kept, float stacked) {
    go = Constant<value = bool {1}>()
    y, kept, stacked = Loop(n, go, x, z) <body = h (int64 i, bool c, float u, float v)
        => (bool c2, float u2, float v2, float w) {
        c2 = Identity(c)
        u2 = Concat<axis=1>(u, v)
        v2 = Relu(v)
        w = Concat<axis=0>(v, v)
    }>
}"""


def test_a_loop_keeps_what_every_iteration_keeps() -> None:
    assert shown(LOOP).startswith("b, ?")
    assert shown(LOOP, output="kept") == "b, 2"
    assert shown(LOOP, output="stacked") == "max($2, 0), 2*b, 2"


def test_functions_are_inferred_per_call() -> None:
    text = """<ir_version: 10, opset_import: ["": 18, "f": 1]>
    g (float[b,4] x, float[2,4] z) => (float y, float w)
    { y = f.twice<n=1>(x)  w = f.twice<n=0>(z) }
    <domain: "f", opset_import: ["": 18]> twice <n> (a) => (r)
    { r = Concat<axis: int = @n>(a, a) }"""
    assert shown(text) == "b, 8"
    assert shown(text, output="w") == "4, 4"
    found = model(text)
    inside = next(iter(found.functions.values())).outputs[0]
    assert Shapes(found).shape(inside) is None, "no call is preferred over another"


def test_overrides_bind_the_symbol_everywhere() -> None:
    found = model("g (float[b,s] x, float[b,4] z) => (float y) { y = Concat<axis=1>(x, z) }")
    shapes = Shapes(found, overrides={"x": [2, "s"]})
    assert str(shapes.shape(value(found, "y"))) == "(2, s + 4)"
    assert shapes.shape(value(found, "z")) == (2, 4)
    for wrong in ({"q": [1]}, {"x": [1]}, {"x": [-1, 2]}):
        with pytest.raises(InputError):
            Shapes(found, overrides=wrong)


def test_update_and_forget() -> None:
    found = model("g (float[b,s] x) => (float y) { y = Relu(x) }")
    shapes = Shapes(found)
    new = ir.Node("", "Concat", [found.graph.inputs[0]] * 2, [ir.onnx_ir.AttrInt64("axis", 1)])
    shapes.update(new, found.graph)
    assert str(shapes.shape(new.outputs[0])) == "(b, 2*s)"
    assert shapes.dtype(new.outputs[0]) == ir.DataType.FLOAT
    shapes.forget(new.outputs[0])
    assert shapes.shape(new.outputs[0]) is None
    unknown = ir.Node("", "NonZero", [found.graph.inputs[0]])
    shapes.update(unknown, found.graph)
    before = shapes.shape(unknown.outputs[0])
    shapes.update(unknown, found.graph)
    assert shapes.shape(unknown.outputs[0]) == before, "the same unknown keeps its name"


def test_slices_hold_for_every_size() -> None:
    lines: list[str] = []
    constants = "int64[1] a = {0}"
    bounds = [-9, -3, -1, 0, 1, 2, 5, 2**63 - 1]
    for i, start in enumerate(bounds):
        for j, end in enumerate(bounds):
            for k, step in enumerate((1, 2, -1)):
                name = f"_{i}_{j}_{k}"
                constants += f", int64[1] s{name}={{{start}}}, int64[1] e{name}={{{end}}}"
                constants += f", int64[1] t{name}={{{step}}}"
                lines.append(f"y{name} = Slice(x, s{name}, e{name}, a, t{name})")
    text = f"g (float[n,m] x) => (float y_0_0_0) <{constants}> {{ {' '.join(lines)} }}"
    found = model(text)
    shapes, session = Shapes(found), Everything(found)
    for size in range(8):
        result = agreement(shapes, session.run({"x": np.zeros((size, 2), np.float32)}))
        assert not result.errors
    known = [shapes.shape(v) for node in found.graph for v in node.outputs]
    undecided = [s for s in known if s is not None and str(s[0]).startswith("?")]
    assert len(undecided) <= len(known) // 3, "only backward slices are left open"


WINDOWS = [(1, 1, 0), (2, 2, 0), (2, 3, 0), (3, 2, 1), (3, 1, 1), (2, 4, 1), (4, 2, 1)]


@pytest.mark.parametrize(("kernel", "stride", "pad"), WINDOWS)
def test_windows_hold_for_every_size(kernel: int, stride: int, pad: int) -> None:
    same = f'e = MaxPool<kernel_shape=[{kernel}], strides=[{stride}], auto_pad="SAME_LOWER">(x)'
    same = same if stride <= kernel else ""  # else padding would be negative
    common = f"kernel_shape=[{kernel}], strides=[{stride}]"
    ones = ",".join("1" * kernel)
    text = f"""g (float[1,1,n] x) => (float a) <float[1,1,{kernel}] w = {{{ones}}}> {{
        a = Conv<{common}, pads=[{pad},{pad}]>(x, w)
        b = MaxPool<{common}, pads=[{pad},{pad}]>(x)
        c = MaxPool<{common}, pads=[{pad},{pad}], ceil_mode=1>(x)
        d = AveragePool<{common}, ceil_mode=1>(x)
        {same}
        f = ConvTranspose<{common}, pads=[{pad},{pad}]>(x, w)
    }}"""
    found = model(text)
    shapes, session = Shapes(found), Everything(found)
    for size in range(kernel, 14):
        result = agreement(shapes, session.run({"x": np.zeros((1, 1, size), np.float32)}))
        assert not result.errors


ARITHMETIC = """g (float[n,m] x, int64 k) => (int64 y) {
    s = Shape(x)
    i0 = Constant<value_ints = [0]>()
    i1 = Constant<value_ints = [1]>()
    two = Constant<value_ints = [2]>()
    n = Gather(s, i0)
    m = Slice(s, i1, two)
    a = Div(n, two)
    b = Mod(m, two)
    c = Sub(n, m)
    d = Mul(n, m)
    e = Max(n, two)
    f = Min(m, two, n)
    g = Concat<axis=0>(a, b, c, d, e, f)
    h = ReduceSum(g, i0)
    i = ReduceProd(s)
    fl = Cast<to=1>(n)
    half = Constant<value_floats = [2.0]>()
    twice = Mul(fl, half)
    back = Cast<to=7>(twice)
    neg = Neg(n)
    big = Greater(n, neg)
    o = Equal(m, neg)
    shape2 = Concat<axis=0>(back, n)
    filled = ConstantOfShape(shape2)
    size = Size(filled)
    zero = Constant<value_int = 0>()
    one = Constant<value_int = 1>()
    nn = Squeeze(n, i0)
    range = Range(zero, nn, one)
    range2 = Range(k, nn, one)
    f0 = Constant<value_float = 0.0>()
    f2 = Constant<value_float = 2.0>()
    fln = Squeeze(fl, i0)
    range3 = Range(f0, fln, f2)
    cum = CumSum(s, i0)
    y = Identity(h)
}"""


def test_values_hold_for_every_size() -> None:
    found = model(ARITHMETIC)
    shapes, session = Shapes(found), Everything(found)
    for n in range(6):
        for m in range(6):
            feeds = {"x": np.zeros((n, m), np.float32), "k": np.array(n - 2 + m % 5)}
            result = agreement(shapes, session.run(feeds))
            assert not result.errors and result.checked >= 64


HOSTILE = [
    "g (float[2,3] x, float[4,5] z) => (float y) { y = Add(x, z) }",
    "g (float[2,3] x, float[4,5] z) => (float y) { y = MatMul(x, z)  w = Conv(x, z) }",
    "g (float[2] x) => (float y) { y = Transpose<perm=[0,5]>(x)  z = Concat<axis=9>(x, x) }",
    "g (float[2] x) => (float y) { y = Gather<axis=4>(x, x)  z = Softmax(x, x, x) }",
    "g (float[9223372036854775807,9223372036854775807] x) => (float y) { y = Flatten<axis=0>(x) }",
    "g (float[b] x) => (float y) { y = Conv<strides=[0]>(x, x)  z = Reshape(x) w = Split(x) }",
    "g (float[b,c,h] x, float[m,c,k] w) => (float y) { y = Conv<strides=[0]>(x, w) }",
    "g (float[b,c,h] x, float[m,c,k] w) => (float y) { y = MaxPool<kernel_shape=[-9]>(x) }",
    "g (float x) => (float y) { y = Cast<to=999>(x)  z = Cast(x)  w = ConstantOfShape(x) }",
    "g (float x) => (float y) <int64[2] s = {9999999999, 9999999999}> "
    "{ y = ConstantOfShape(s)  z = Expand(x, s) w = Tile(y, s) v = Range(x, x, x) }",
    "g (float x) => (float y) <int64[2] s = {-5, -1}> "
    "{ y = ConstantOfShape(s)  z = Reshape(x, s) }",
    'g (float[a,b] x) => (float y) { y = Einsum<equation="ij,,jk->">(x)  z = Einsum(x, x) }',
    "g (float[a,b] x) => (float y) { y = If(x)  z = Loop(x, x)  w = Scan(x) }",
    "g (int64 x) => (int64 y) <int64 z = {0}> { y = Div(x, z)  w = Mod(z, z) v = Range(x, x, z) }",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_raises(text: str) -> None:
    found = model(text)
    shapes = Shapes(found)
    for node in found.graph:
        for output in node.outputs:
            shapes.size(output)
            shapes.values(output)


def _chain(line: str, count: int, first: str = "x") -> str:
    lines = [line.format(a=first if i == 0 else f"v{i}", r=f"v{i + 1}") for i in range(count)]
    return " ".join(lines)


BOMBS = [
    ("float[a,b] x", "{r} = Gather({a}, {a})", 200),  # the rank doubles
    ("int64[1] x", "{r} = Mul({a}, {a})", 200),  # a polynomial squares
    ("int64[n] x", "{r} = Concat<axis=0>({a}, {a})", 5000),
    ("float[n,n] x", "{r} = Concat<axis=0>({a}, {a})", 5000),
    ("float[n,m] x", '{r} = Einsum<equation="ij,kl->ijkl">({a}, {a})', 50),
    ("int64[n] x", "{r} = Shape({a})", 1000),
]


@pytest.mark.parametrize(("given", "line", "count"), BOMBS)
def test_small_models_cannot_take_long(given: str, line: str, count: int) -> None:
    text = f"g ({given}) => (float y) {{ s0 = Shape(x) {_chain(line, count)} }}"
    started = time.process_time()
    Shapes(model(text))
    assert time.process_time() - started < 4


def test_nested_loops_and_calls_cannot_take_long() -> None:
    body = "u2 = Concat<axis=0>(u, u)"
    for depth in range(6):
        body = (
            f"u2 = Loop(n, , u) <body = b{depth} (int64 i, bool c, float u) => (bool c2, float u2) "
            f"{{ c2 = Identity(c) {body} }}>"
        )
    text = f"g (float[k] u, int64 n) => (float u2) {{ {body} }}"
    functions = '<domain: "f", opset_import: ["": 18]> f0 (a) => (r) { r = Relu(a) }'
    for depth in range(1, 25):
        functions += (
            f' <domain: "f", opset_import: ["": 18, "f": 1]> f{depth} (a) => (r) '
            f"{{ b = f.f{depth - 1}(a) r = f.f{depth - 1}(b) }}"
        )
    calls = (
        '<ir_version: 10, opset_import: ["": 18, "f": 1]> '
        f"g (float[k] x) => (float y) {{ y = f.f24(x) }} {functions}"
    )
    for source in (text, calls):
        started = time.process_time()
        Shapes(model(source))
        assert time.process_time() - started < 30


def test_time_per_node_is_linear() -> None:
    line = "{r} = Relu({a})"
    seconds: list[float] = []
    for count in (1_000, 20_000):
        found = model(f"g (float[b,64] x) => (float y) {{ {_chain(line, count)} }}")
        started = time.process_time()
        Shapes(found)
        seconds.append((time.process_time() - started) / count)
    assert seconds[1] < 60e-6 and seconds[1] < 3 * seconds[0]
