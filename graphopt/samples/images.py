"""Folders of images as samples: size, colours, layout and normalization said by the user.

The middle of each image is cut out in the shape that the model takes after its shorter side was
scaled, as image classifiers are evaluated.
"""

from __future__ import annotations

import csv
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.errors import InputError, MissingError

Array = npt.NDArray[Any]

_COLOURS = (1, 3)


@dataclass(frozen=True)
class Images:
    """How files become arrays: (pixel - mean) / std, pixels being 0 to 255."""

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: tuple[int, int] | None = None
    """Height and width; the model's where it fixes them."""
    layout: str = ""
    """`nchw` or `nhwc`; told by the model's shape where empty."""
    order: str = "rgb"
    """`rgb` or `bgr`."""
    crop: float = 0.875
    """The share of the shorter side that is cut out."""

    def plan(self, value: ir.Value) -> Plan:
        """What to make of images for an input. InputError says what cannot be told."""
        shape = list(value.shape or ())
        if len(shape) != 4:
            raise InputError(f"images need an input of rank 4, {value.name!r} has {len(shape)}")
        sizes = [dim if isinstance(dim, int) else 0 for dim in shape]
        layout = self.layout.lower()
        if not layout:
            first, last = sizes[1] in _COLOURS, sizes[3] in _COLOURS
            if first == last:
                raise InputError(f"input {value.name!r}: say the layout of images, nchw or nhwc")
            layout = "nchw" if first else "nhwc"
        if layout not in ("nchw", "nhwc") or self.order not in ("rgb", "bgr"):
            raise InputError("images have a layout nchw or nhwc and an order rgb or bgr")
        colours = sizes[1 if layout == "nchw" else 3] or 3
        height, width = sizes[2:4] if layout == "nchw" else sizes[1:3]
        wanted = self.size or (height, width)
        if not all(wanted):
            raise InputError(f"input {value.name!r} leaves the size of images open: say it")
        if self.mean is None or self.std is None:
            raise InputError(
                "a folder of images needs their mean and std in pixels of 0 to 255, "
                "for -1 to 1 both 127.5"
            )
        if value.dtype is None or colours not in _COLOURS:
            raise InputError(f"input {value.name!r} takes no images of {colours} colours")
        mean, std = (_per_colour(v, colours) for v in (self.mean, self.std))
        if not std.all():
            raise InputError("the std of images is not 0")
        return Plan(wanted, colours, layout, self.order, self.crop, mean, std)


@dataclass(frozen=True)
class Plan:
    """`Images` with everything known."""

    size: tuple[int, int]
    colours: int
    layout: str
    order: str
    crop: float
    mean: Array
    std: Array

    def read(self, path: Path) -> Array:
        """One image, [1, colours, height, width] or [1, height, width, colours], float32."""
        pillow: Any = _pillow()
        height, width = self.size
        try:
            with pillow.open(path) as opened:
                image = opened.convert("L" if self.colours == 1 else "RGB")
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: no readable image ({error})") from error
        scale = max(height / image.height, width / image.width) / self.crop
        scaled = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        image = image.resize(scaled, pillow.Resampling.BILINEAR)
        left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
        cut = image.crop((left, top, left + width, top + height))
        pixels: Array = np.asarray(cut, np.float32).reshape(height, width, self.colours)
        if self.order == "bgr":
            pixels = pixels[..., ::-1]
        pixels = (pixels - self.mean) / self.std
        if self.layout == "nchw":
            pixels = pixels.transpose(2, 0, 1)
        return np.ascontiguousarray(pixels[None], np.float32)


def labels(folder: Path, files: Sequence[Path]) -> Array | None:
    """The classes of a `labels.csv` with columns `file` and `class` (or `label`), if there is one.

    InputError where it leaves a file out.
    """
    table = folder / "labels.csv"
    if not table.is_file():
        return None
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    key = "class" if rows and "class" in rows[0] else "label"
    try:
        known = {row["file"]: int(row[key]) for row in rows}
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{table}: has the columns file and class (a number)") from error
    names = [file.relative_to(folder).as_posix() for file in files]
    lacking = [name for name in names if name not in known]
    if lacking:
        raise InputError(f"{table}: has no class for {lacking[0]}")
    return np.array([known[name] for name in names])


def read(plan: Plan, name: str, files: Sequence[Path]) -> Iterator[dict[str, Array]]:
    """A row for each file."""
    for file in files:
        yield {name: plan.read(file)}


def _per_colour(values: Sequence[float], colours: int) -> Array:
    if len(values) not in (1, colours):
        raise InputError(f"mean and std are one number or {colours}, not {len(values)}")
    return np.asarray(values, np.float32)


def _pillow() -> Any:
    try:
        return importlib.import_module("PIL.Image")
    except ImportError as error:
        raise MissingError("images need pillow: pip install 'graphopt[images]'") from error
