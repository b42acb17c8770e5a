"""A speech enhancer that works frame by frame, as torch's legacy exporter writes it.

    python -m tests.benchmarks.streaming OUT.onnx [--layers 3] [--hidden 16] [--opset 17]

After GTCRN and DPCRN: bands of the spectrum, an encoder of small grouped and dilated convolutions
that are fed from caches of frames before, dual paths of GRUs over frequency and over time, a
decoder with skips, a complex mask. A frame is 257 bins; every cache goes in and comes out. Most of
its some 500 nodes take a microsecond or two, so what is measured is what a node costs.
Needs torch and onnx, and nothing of graphopt, so that it can be made in an environment of its own.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from tests.benchmarks._torch_export import main, varied, write

# mypy: allow-subclassing-any
torch: Any = importlib.import_module("torch")
nn: Any = torch.nn

BINS, LOW, BANDS = 257, 65, 64


class Unit(nn.Module):
    """A separable convolution over time and frequency whose past frames are a cache."""

    def __init__(self, channels: int, dilation: int) -> None:
        nn.Module.__init__(self)
        half = channels // 2
        self.past, self.dilation = 2 * dilation, dilation
        self.enter, self.leave = nn.Conv2d(3 * half, channels, 1), nn.Conv2d(channels, half, 1)
        self.first, self.last = nn.BatchNorm2d(channels), nn.BatchNorm2d(half)
        self.middle = nn.BatchNorm2d(channels)
        self.depth = nn.Conv2d(
            channels, channels, 3, padding=(0, 1), dilation=(dilation, 1), groups=channels
        )
        self.act, self.act2 = nn.PReLU(), nn.PReLU()
        self.gate = nn.GRU(half, 2 * half, batch_first=True)
        self.gate_out = nn.Linear(2 * half, half)

    def neighbours(self, x: Any) -> Any:
        """Each bin with those beside it, as more channels."""
        b, c, t, f = x.shape
        wide = nn.functional.unfold(x.reshape(b * c, 1, t, f), (1, 3), padding=(0, 1))
        return wide.reshape(b, c * 3, t, f)

    def forward(self, x: Any, cache: Any, state: Any) -> tuple[Any, Any, Any]:
        one, two = torch.chunk(x, 2, dim=1)
        y = self.act(self.first(self.enter(self.neighbours(one))))
        y = torch.cat([cache, y], dim=2)
        cache = y[:, :, 1:]
        y = self.last(self.leave(self.act2(self.middle(self.depth(y)))))
        energy = torch.mean(y.pow(2), dim=-1).transpose(1, 2)
        weight, state = self.gate(energy, state)
        weight = torch.sigmoid(self.gate_out(weight)).transpose(1, 2)[..., None]
        y = torch.stack([y * weight, two], dim=1).transpose(1, 2).contiguous()
        return y.reshape(x.shape), cache, state


class Norm(nn.Module):
    """Layer normalization over frequencies and channels, from its parts."""

    def __init__(self, width: int, hidden: int) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.ones(width, hidden))
        self.bias = nn.Parameter(torch.zeros(width, hidden))

    def forward(self, x: Any) -> Any:
        mean = x.mean(dim=(-2, -1), keepdim=True)
        spread = (x - mean).pow(2).mean(dim=(-2, -1), keepdim=True)
        return (x - mean) / torch.sqrt(spread + 1e-8) * self.weight + self.bias


class DualPath(nn.Module):
    """GRUs along the frequencies of a frame, both ways, and along time, whose state is kept."""

    def __init__(self, hidden: int, width: int) -> None:
        nn.Module.__init__(self)
        self.across = nn.GRU(hidden, hidden // 2, batch_first=True, bidirectional=True)
        self.along = nn.GRU(hidden, hidden, batch_first=True)
        self.one, self.two = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.norms = nn.ModuleList(Norm(width, hidden) for _ in range(2))

    def forward(self, x: Any, state: Any) -> tuple[Any, Any]:
        x = x.permute(0, 2, 3, 1)
        b, t, f, c = x.shape
        y, _ = self.across(x.reshape(b * t, f, c))
        x = x + self.norms[0](self.one(y).view(b, t, f, c))
        y = x.permute(0, 2, 1, 3).reshape(b * f, t, c)
        y, state = self.along(y, state)
        y = self.two(y).view(b, f, t, c).permute(0, 2, 1, 3)
        return (x + self.norms[1](y)).permute(0, 3, 1, 2), state


class Enhancer(nn.Module):
    """The spectrum of a frame, cleaned, and all caches."""

    def __init__(self, layers: int, hidden: int) -> None:
        nn.Module.__init__(self)
        self.to_bands = nn.Linear(BINS - LOW, BANDS, bias=False)
        self.to_bins = nn.Linear(BANDS, BINS - LOW, bias=False)
        self.down = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inner, hidden, (1, 5), stride=(1, 2), padding=(0, 2)),
                nn.BatchNorm2d(hidden),
                nn.PReLU(),
            )
            for inner in (9, hidden)
        )
        self.up = nn.ModuleList(
            nn.Sequential(
                nn.ConvTranspose2d(hidden, outer, (1, 5), stride=(1, 2), padding=(0, 2)),
                nn.BatchNorm2d(outer),
                nn.Tanh() if outer == 2 else nn.PReLU(),
            )
            for outer in (hidden, 2)
        )
        self.before = nn.ModuleList(Unit(hidden, 2**i) for i in range(layers))
        self.after = nn.ModuleList(Unit(hidden, 2**i) for i in range(layers))
        self.paths = nn.ModuleList(DualPath(hidden, 33) for _ in range(2))

    def forward(self, spectrum: Any, *caches: Any) -> Any:
        left, new = list(caches), list[Any]()
        real, imaginary = spectrum[..., 0], spectrum[..., 1]
        size = torch.sqrt(real**2 + imaginary**2 + 1e-12)
        x = torch.stack([size, real, imaginary], dim=1).permute(0, 1, 3, 2)
        x = torch.cat([x[..., :LOW], self.to_bands(x[..., LOW:])], dim=-1)
        b, c, t, f = x.shape
        wide = nn.functional.unfold(x.reshape(b * c, 1, t, f), (1, 3), padding=(0, 1))
        x = wide.reshape(b, c * 3, t, f)
        skips: list[Any] = []
        for layer in self.down:
            x = layer(x)
            skips.append(x)
        for unit in self.before:
            x, cache, state = unit(x, left.pop(0), left.pop(0))
            skips.append(x)
            new += [cache, state]
        for path in self.paths:
            x, state = path(x, left.pop(0))
            new.append(state)
        for unit in self.after:
            x, cache, state = unit(x + skips.pop(), left.pop(0), left.pop(0))
            new += [cache, state]
        for layer in self.up:
            x = layer(x + skips.pop())
        mask = torch.cat([x[..., :LOW], self.to_bins(x[..., LOW:])], dim=-1).permute(0, 3, 2, 1)
        a, b = mask[..., 0], mask[..., 1]
        made = torch.stack([real * a - imaginary * b, imaginary * a + real * b], dim=-1)
        return (made, *new)


def export(path: Path, layers: int = 3, hidden: int = 16, opset: int = 17) -> None:
    """Write the model; the same weights each time."""
    torch.manual_seed(0)
    model = varied(Enhancer(layers, hidden))
    inputs = {"spectrum": torch.randn(1, BINS, 1, 2)}
    for side in ("before", "after"):
        for index in range(layers):
            inputs[f"{side}.{index}.frames"] = torch.zeros(1, hidden, 2 ** (index + 1), 33)
            inputs[f"{side}.{index}.state"] = torch.zeros(1, 1, hidden)
        if side == "before":
            inputs |= {f"path.{i}": torch.zeros(1, 33, hidden) for i in range(2)}
    outputs = ["cleaned", *(f"{name}.next" for name in list(inputs)[1:])]
    write(model, inputs, path, outputs, {}, opset)


if __name__ == "__main__":
    main(__doc__, export, layers=3, hidden=16)
