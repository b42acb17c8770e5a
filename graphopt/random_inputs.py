"""Random inputs that a model accepts: shapes that fit together, ids inside their tables."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from graphopt import ir
from graphopt.dims import Dim, DimLike, atoms, evaluate
from graphopt.errors import GraphoptError, InputError, TimeLimitError
from graphopt.input_uses import Known, Tracer, Uses
from graphopt.ir import Array
from graphopt.runner import Runner

__all__ = ["random_feeds", "required_inputs", "single_feeds", "workable_feeds"]

_MOST_BYTES = 2 << 30
_WORDS = ("the", "a", "quick", "brown", "fox", "jumps", "over", "lazy", "dog")
_INTEGERS = frozenset(
    (
        *(ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64),
        *(ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64),
        *(ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT2, ir.DataType.UINT2),
    )
)


@dataclass(frozen=True)
class _Guess:
    """Sizes for dimensions that the model leaves open, by what they look like."""

    batch: int = 2
    length: int = 16
    image: int = 64
    rank: int = 2


# Batch 2 before 1, since it tells an axis from a broadcast one; lengths and image sizes that
# published models commonly insist on.
_GUESSES = [
    replace(_Guess(batch=batch, length=length, image=image), rank=rank)
    for length, image, rank in (
        *((16, 64, 2), (64, 224, 4), (8, 32, 3), (256, 128, 1), (512, 256, 0), (576, 320, 2)),
        *((1024, 416, 2), (4000, 512, 2), (16000, 640, 2), (128, 96, 2), (1, 28, 2)),
    )
    for batch in (2, 1)
]


def required_inputs(model: ir.Model) -> list[ir.Value]:
    """The graph's inputs that have no default."""
    return [v for v in model.graph.inputs if v.name not in model.graph.initializers]


def random_feeds(
    model: ir.Model, shapes: Known, *, seed: int = 0, bindings: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Random values for every required input, the same for the same seed.

    Floats are standard normal. Integers stay inside the tables that they index, masks are mostly
    one, counts and lengths small. Sequences are lists of arrays. `bindings` give symbolic
    dimensions by name; the others get a size by their name and place, the same wherever a symbol
    stands: 2 for batches, 16 for lengths, 64 for images.

    Raises InputError for a type that cannot be made up (maps) or more than 2 GB.
    """
    return _feeds(model, shapes, seed, bindings or {}, _Guess())


def workable_feeds(
    model: ir.Model, shapes: Known, *, seed: int = 0, bindings: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """`random_feeds` with the first of a series of sizes that the model runs with.

    Nothing is run where the model leaves no size open. Raises GraphoptError, with the first
    attempt's message, where none of them works.
    """
    feeds = _feeds(model, shapes, seed, bindings or {}, _Guess())
    given = bindings or {}
    if all(name in given for v in required_inputs(model) for name in _open(_dims(v, shapes))):
        return feeds
    runner = Runner(model)
    first: GraphoptError | None = None
    tried: set[str] = set()
    for guess in _GUESSES:
        feeds = _feeds(model, shapes, seed, given, guess)
        key = str({name: np.shape(value) for name, value in feeds.items()})
        if key in tried:
            continue
        tried.add(key)
        try:
            runner.run(feeds)
        except TimeLimitError:
            raise  # other sizes would not end either
        except GraphoptError as error:
            first = first or error
        else:
            return feeds
    raise GraphoptError(
        f"no random input was found that the model runs on, so that it needs some given: {first}"
    )


def single_feeds(
    model: ir.Model,
    shapes: Known,
    run: Callable[[dict[str, Any]], object],
    *,
    seed: int = 0,
    bindings: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """`workable_feeds` of batch 1 where that is free and `run` takes it; raises as that does."""
    given = bindings or {}
    firsts = [dims[0] for v in model.graph.inputs if len(dims := shapes.shape(v) or ()) > 1]
    single = {str(dim): 1 for dim in firsts if not isinstance(dim, int)}
    try:
        feeds = workable_feeds(model, shapes, seed=seed, bindings={**single, **given})
        run(feeds)
    except TimeLimitError:
        raise  # other sizes would not end either
    except GraphoptError:
        feeds = workable_feeds(model, shapes, seed=seed, bindings=given)
    return feeds


def _dims(value: ir.Value, shapes: Known) -> Sequence[DimLike] | None:
    """An input's dimensions, of its items for a sequence or an optional; None without a rank."""
    known = shapes.shape(value)
    if known is not None or value.shape is None:
        return known
    return [
        dim if isinstance(dim, int) else Dim.symbol(dim.value or f"{value.name}?{axis}")
        for axis, dim in enumerate(value.shape)
    ]


def _open(dims: Sequence[DimLike] | None) -> list[str]:
    """Names of a shape's symbols; a single "?" where even its rank is unknown."""
    return ["?"] if dims is None else [atom.name for d in dims for atom in atoms(d)]


def _feeds(
    model: ir.Model, shapes: Known, seed: int, bindings: Mapping[str, int], guess: _Guess
) -> dict[str, Any]:
    inputs = required_inputs(model)
    sizes = _sizes([_dims(v, shapes) for v in inputs], bindings, guess)
    tracer = Tracer(model, shapes, sizes)
    forms: list[tuple[int, ...]] = []
    for dims in (_dims(value, shapes) for value in inputs):
        forms.append(_any_shape(guess) if dims is None else _concrete(dims, sizes))
    feeds: dict[str, Any] = {}
    for index, (value, shape) in enumerate(zip(inputs, forms, strict=True)):
        rng = np.random.default_rng([seed, index])
        most = replace(guess, length=_longest(shape, forms, guess.length))
        feeds[value.name or ""] = _value(value, shape, tracer.trace(value), rng, most)
    return feeds


def _longest(shape: tuple[int, ...], forms: Sequence[tuple[int, ...]], usual: int) -> int:
    """The length that each of so many items may have: no more than there are places for it."""
    if len(shape) != 1:
        return usual
    sides = [list(form) for form in forms if len(form) > 1]
    for form in sides:
        if shape[0] in form:
            form.remove(shape[0])  # the items themselves
    return min((usual, *(size for form in sides for size in form if size)))


def _any_shape(guess: _Guess) -> tuple[int, ...]:
    """A shape for an input of unknown rank."""
    shapes = ((), (guess.batch,), (guess.batch, guess.length), (guess.batch, guess.length, 8))
    return (*shapes, (guess.batch, 3, guess.image, guess.image))[guess.rank]


def _concrete(dims: Sequence[DimLike], sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(max(0, evaluate(d, sizes, 1)) for d in dims)


def _sizes(
    shapes: Sequence[Sequence[DimLike] | None], bindings: Mapping[str, int], guess: _Guess
) -> dict[str, int]:
    """A number for every symbol, by its name and its first place among the inputs' dimensions."""
    sizes = dict(bindings)
    for dims in shapes:
        free = 0
        for axis, dim in enumerate(dims or ()):
            for atom in atoms(dim):
                if atom.name not in sizes:
                    sizes[atom.name] = _guess_size(atom.name, axis, dims or (), free == 0, guess)
            free += isinstance(dim, Dim)
    for name in sizes:
        if name not in bindings:  # exporters write "past + sequence" as one name
            sizes[name] = _arithmetic(name, sizes) or sizes[name]
    return sizes


def _guess_size(name: str, axis: int, dims: Sequence[DimLike], first: bool, guess: _Guess) -> int:
    text = name.lower()
    if any(word in text for word in ("batch", "bsz")):
        return guess.batch
    if any(word in text for word in ("height", "width")) or text in ("h", "w"):
        return guess.image
    if any(word in text for word in ("seq", "len", "time", "token", "sample", "frame", "past")):
        return guess.length
    if first:
        return guess.batch
    return guess.image if len(dims) in (4, 5) and axis > 0 else guess.length


def _arithmetic(text: str, sizes: Mapping[str, int]) -> int | None:
    """The value of a name that is a sum or product of other names; None for plain names."""
    try:
        tree = ast.parse(text[:200], mode="eval").body
        return _compute(tree, sizes) if isinstance(tree, ast.BinOp) else None
    except (SyntaxError, ValueError, KeyError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _compute(tree: ast.expr, sizes: Mapping[str, int]) -> int:
    match tree:
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _compute(left, sizes) + _compute(right, sizes)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return _compute(left, sizes) - _compute(right, sizes)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _compute(left, sizes) * _compute(right, sizes)
        case ast.BinOp(left=left, op=ast.Div() | ast.FloorDiv(), right=right):
            return _compute(left, sizes) // _compute(right, sizes)
        case ast.Name(id=name):
            return sizes[name]
        case ast.Constant(value=int(number)):
            return number
        case _:
            raise ValueError("not arithmetic")


def _value(
    value: ir.Value, shape: tuple[int, ...], uses: Uses, rng: np.random.Generator, guess: _Guess
) -> Any:
    """What goes into one input: an array, or a list of two for a sequence."""
    kind = value.type
    if isinstance(kind, ir.OptionalType):
        kind = kind.elem_type
    sequence = isinstance(kind, ir.SequenceType)
    if isinstance(kind, ir.SequenceType):
        kind = kind.elem_type
    if not isinstance(kind, ir.TensorType):
        raise InputError(f"input {value.name!r} is of a type that cannot be made up: give inputs")
    bits = 8 if kind.dtype == ir.DataType.STRING else kind.dtype.bitwidth
    if math.prod(shape) * max(1, bits // 8) > _MOST_BYTES:
        raise InputError(f"input {value.name!r} of shape {list(shape)} is beyond 2 GB")
    name = (value.name or "").lower()
    arrays = [_array(name, kind.dtype, shape, uses, rng, guess) for _ in range(1 + sequence)]
    return arrays if sequence else arrays[0]


def _array(
    name: str,
    dtype: ir.DataType,
    shape: tuple[int, ...],
    uses: Uses,
    rng: np.random.Generator,
    guess: _Guess,
) -> Array:
    if dtype == ir.DataType.STRING:
        texts = [_text(c) for c in uses.candidates] or list(_WORDS)
        return np.asarray(texts, object)[rng.integers(len(texts), size=shape)]
    if "mask" in name:
        mask = np.asarray(rng.random(shape) < 0.85)
        # a row that attends to nothing is NaN in many models
        mask[(..., slice(1)) if shape else ()] = True
        return mask.astype(dtype.numpy())
    if dtype == ir.DataType.BOOL:
        return np.asarray(rng.random(shape) < 0.5)
    if dtype in _INTEGERS or uses.limit is not None:
        return _integers(name, dtype, shape, uses, rng, guess).astype(dtype.numpy())
    if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
        parts = rng.standard_normal((2, *shape))
        return cast(Array, (parts[0] + 1j * parts[1]).astype(dtype.numpy()))
    if dtype == ir.DataType.DOUBLE:
        return np.asarray(rng.standard_normal(shape))
    numbers = np.asarray(rng.standard_normal(shape, np.float32))
    return np.abs(numbers).astype(dtype.numpy()) if uses.counts else numbers.astype(dtype.numpy())


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _integers(
    name: str,
    dtype: ir.DataType,
    shape: tuple[int, ...],
    uses: Uses,
    rng: np.random.Generator,
    guess: _Guess,
) -> Array:
    """Integers that the model can use, by what it does with them, else by name and type."""
    size = math.prod(shape)
    numbers = [c for c in uses.candidates if not isinstance(c, str | bytes)]
    if numbers and (size == 1 or len(numbers) > 8) and uses.limit is None:
        chosen = [numbers[0]] * size if size == 1 else rng.choice(numbers, size)
        return np.asarray(chosen).reshape(shape)
    limit = uses.limit
    if limit is not None and "position" in name and shape:
        return np.broadcast_to(np.arange(shape[-1]) % limit, shape)
    if limit is not None:
        low = 1 if uses.counts and limit > 1 else 0
        return rng.integers(low, min(limit, 5) if uses.counts else limit, shape)
    if len(shape) < 2 and "len" in name:
        return np.full(shape, guess.length)
    if uses.counts or size == 1:
        return rng.integers(1, 5 if dtype.bitwidth >= 8 else 2, shape)
    if dtype in (ir.DataType.INT8, ir.DataType.UINT8):
        limits = np.iinfo(dtype.numpy())
        return rng.integers(limits.min, limits.max + 1, shape)
    # Never 0, which integer division does not survive.
    return rng.integers(1, 10 if dtype.bitwidth >= 8 else 2, shape)
