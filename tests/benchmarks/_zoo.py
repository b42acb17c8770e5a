"""Networks of many architectures in torch, of full size or small, with random weights.

They follow the papers named with each. BatchNormalizations, biases and scales are random too: what
is zero everywhere would be shared, and would hide mistakes. Needs torch and nothing of graphopt.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

torch: Any = importlib.import_module("torch")
nn: Any = torch.nn
functional: Any = torch.nn.functional

Layers = tuple[int, ...]


class Add(nn.Module):
    """The input, or what a shortcut makes of it, and a body's result."""

    def __init__(self, body: Any, shortcut: Any = None, after: Any = None) -> None:
        nn.Module.__init__(self)
        self.body, self.shortcut, self.after = body, shortcut, after

    def forward(self, x: Any) -> Any:
        y = self.body(x) + (x if self.shortcut is None else self.shortcut(x))
        return y if self.after is None else self.after(y)


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        nn.Module.__init__(self)
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x)


def unit(
    inner: int, outer: int, kernel: int = 1, step: int = 1, groups: int = 1, act: Any = nn.ReLU
) -> Any:
    """Convolution, BatchNormalization and an activation, or none."""
    pad = kernel // 2
    conv = nn.Conv2d(inner, outer, kernel, step, pad, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outer), *([] if act is None else [act()]))


def head(width: int, classes: int) -> list[Any]:
    """Average pool and classifier."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]


def resnet(layers: Layers, *, bottleneck: bool, groups: int = 1, base: int = 64) -> Any:
    """He et al. 2016; with groups Xie et al. 2017, ResNeXt (32x4d: groups 32, base 128)."""
    width = 64
    stages = [unit(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
    for stage, count in enumerate(layers):
        outer = 64 * 2**stage * (4 if bottleneck else 1)
        inner = base * 2**stage
        for index in range(count):
            step = 2 if stage and not index else 1
            if bottleneck:
                body = [
                    unit(width, inner),
                    unit(inner, inner, 3, step, groups),
                    unit(inner, outer, act=None),
                ]
            else:
                body = [unit(width, inner, 3, step), unit(inner, outer, 3, act=None)]
            same = width == outer and step == 1
            shortcut = None if same else unit(width, outer, 1, step, act=None)
            stages.append(Add(nn.Sequential(*body), shortcut, nn.ReLU()))
            width = outer
    return nn.Sequential(*stages, *head(width, 1000))


class Dense(nn.Module):
    """All earlier results side by side."""

    def __init__(self, width: int, growth: int) -> None:
        nn.Module.__init__(self)
        self.body = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.ReLU(),
            unit(width, 4 * growth),
            nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, x: Any) -> Any:
        return torch.cat([x, self.body(x)], 1)


def densenet(layers: Layers) -> Any:
    """Huang et al. 2017."""
    width, growth = 64, 32
    parts = [unit(3, width, 7, 2), nn.MaxPool2d(3, 2, 1)]
    for stage, count in enumerate(layers):
        if stage:
            parts += [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width // 2, 1, bias=False)]
            parts.append(nn.AvgPool2d(2))
            width //= 2
        for _ in range(count):
            parts.append(Dense(width, growth))
            width += growth
    return nn.Sequential(*parts, nn.BatchNorm2d(width), nn.ReLU(), *head(width, 1000))


class Shuffle(nn.Module):
    """Ma et al. 2018, ShuffleNet V2: half the channels pass, and all are shuffled."""

    def __init__(self, inner: int, outer: int, step: int) -> None:
        nn.Module.__init__(self)
        half, self.step = outer // 2, step
        first = inner if step > 1 else half
        self.right = nn.Sequential(
            unit(first, half), unit(half, half, 3, step, half, None), unit(half, half)
        )
        self.left = nn.Sequential(unit(inner, inner, 3, 2, inner, None), unit(inner, half))

    def forward(self, x: Any) -> Any:
        if self.step > 1:
            left, right = self.left(x), self.right(x)
        else:
            left, right = x.chunk(2, 1)
            right = self.right(right)
        y = torch.cat([left, right], 1)
        batch, channels, height, width = y.shape
        y = y.view(batch, 2, channels // 2, height, width).transpose(1, 2)
        return y.reshape(batch, channels, height, width)


def shufflenet(layers: Layers) -> Any:
    """Ma et al. 2018."""
    parts = [unit(3, 24, 3, 2), nn.MaxPool2d(3, 2, 1)]
    width = 24
    for outer, count in zip((116, 232, 464), layers, strict=True):
        for index in range(count):
            parts.append(Shuffle(width, outer, 1 if index else 2))
            width = outer
    return nn.Sequential(*parts, unit(width, 1024), *head(1024, 1000))


def mobilenet(layers: Layers) -> Any:
    """Sandler et al. 2018, MobileNetV2."""
    parts, width = [unit(3, 32, 3, 2, act=nn.ReLU6)], 32
    sizes = (16, 24, 32, 64, 96, 160, 320)
    for stage, (outer, count) in enumerate(zip(sizes, layers, strict=True)):
        for index in range(count):
            inner = width * (6 if stage else 1)
            step = 2 if stage in (1, 2, 3, 5) and not index else 1
            body = [unit(width, inner, act=nn.ReLU6)] if stage else []
            body += [
                unit(inner, inner, 3, step, inner, nn.ReLU6),
                unit(inner, outer, act=None),
            ]
            whole = nn.Sequential(*body)
            parts.append(Add(whole) if step == 1 and width == outer else whole)
            width = outer
    return nn.Sequential(*parts, unit(width, 1280, act=nn.ReLU6), *head(1280, 1000))


class Fire(nn.Module):
    """Iandola et al. 2016, SqueezeNet: squeezed, then expanded two ways."""

    def __init__(self, inner: int, squeezed: int, outer: int) -> None:
        nn.Module.__init__(self)
        self.squeeze = nn.Conv2d(inner, squeezed, 1)
        self.small = nn.Conv2d(squeezed, outer, 1)
        self.large = nn.Conv2d(squeezed, outer, 3, padding=1)

    def forward(self, x: Any) -> Any:
        y = torch.relu(self.squeeze(x))
        return torch.cat([torch.relu(self.small(y)), torch.relu(self.large(y))], 1)


def squeezenet(layers: Layers) -> Any:
    """Iandola et al. 2016, version 1.1."""
    parts, width = [nn.Conv2d(3, 64, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)], 64
    for stage, count in enumerate(layers):
        for index in range(count):
            squeezed = 16 * (stage + 1) + (16 * (index // 2) if stage == 2 else 0)
            parts.append(Fire(width, squeezed, 4 * squeezed))
            width = 8 * squeezed
        if stage < 2:
            parts.append(nn.MaxPool2d(3, 2, ceil_mode=True))
    parts += [nn.Conv2d(width, 1000, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*parts)


class Attention(nn.Module):
    """Queries, keys and values of one product; with a window a table of relative positions."""

    def __init__(self, width: int, heads: int, window: int = 0) -> None:
        nn.Module.__init__(self)
        self.heads, self.window = heads, window
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        if window:
            self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
            place = torch.stack(torch.meshgrid(*[torch.arange(window)] * 2, indexing="ij"))
            place = place.flatten(1)
            gap = place[:, :, None] - place[:, None] + window - 1
            self.register_buffer("index", (gap[0] * (2 * window - 1) + gap[1]).view(-1))

    def forward(self, x: Any) -> Any:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scores = q * (width // self.heads) ** -0.5 @ k.transpose(-2, -1)
        if self.window:
            bias = self.table[self.index].view(tokens, tokens, -1)
            scores = scores + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, width)
        return self.out(y)


def mlp(width: int) -> Any:
    """Two products with a Gelu."""
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class Tokens(nn.Module):
    """A class token before the patches, and learnt positions."""

    def __init__(self, width: int, count: int) -> None:
        nn.Module.__init__(self)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.places = nn.Parameter(torch.randn(1, count + 1, width))

    def forward(self, x: Any) -> Any:
        x = x.flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places


def vit(layers: Layers, *, width: int = 768, side: int = 224) -> Any:
    """Dosovitskiy et al. 2021, ViT-B/16."""
    parts: list[Any] = [nn.Conv2d(3, width, 16, 16), Tokens(width, (side // 16) ** 2)]
    for _ in range(layers[0]):
        attention = Attention(width, width // 64)
        parts.append(Add(nn.Sequential(nn.LayerNorm(width), attention)))
        parts.append(Add(nn.Sequential(nn.LayerNorm(width), mlp(width))))
    last = [nn.LayerNorm(width), Apply(lambda x: x[:, 0]), nn.Linear(width, 1000)]
    return nn.Sequential(*parts, *last)


class Windows(nn.Module):
    """Attention within windows, which are shifted or not."""

    def __init__(self, width: int, heads: int, window: int, shift: int) -> None:
        nn.Module.__init__(self)
        self.attention = Attention(width, heads, window)
        self.window, self.shift = window, shift

    def forward(self, x: Any) -> Any:
        batch, height, width, channels = x.shape
        w = self.window
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        x = x.view(batch, height // w, w, width // w, w, channels)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(-1, w * w, channels)
        x = self.attention(x).view(batch, height // w, width // w, w, w, channels)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(batch, height, width, channels)
        return torch.roll(x, (self.shift, self.shift), (1, 2)) if self.shift else x


class Merge(nn.Module):
    """Four patches become one."""

    def __init__(self, width: int) -> None:
        nn.Module.__init__(self)
        self.norm = nn.LayerNorm(4 * width)
        self.reduce = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Any) -> Any:
        parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduce(self.norm(torch.cat(parts, -1)))


def swin(layers: Layers, *, width: int = 96, window: int = 7) -> Any:
    """Liu et al. 2021, Swin-T (without masks in shifted windows)."""
    parts: list[Any] = [nn.Conv2d(3, width, 4, 4), Apply(lambda x: x.permute(0, 2, 3, 1))]
    parts.append(nn.LayerNorm(width))
    for stage, count in enumerate(layers):
        if stage:
            parts.append(Merge(width))
            width *= 2
        for index in range(count):
            own = Windows(width, width // 32, window, window // 2 * (index % 2))
            parts.append(Add(nn.Sequential(nn.LayerNorm(width), own)))
            parts.append(Add(nn.Sequential(nn.LayerNorm(width), mlp(width))))
    last = [nn.LayerNorm(width), Apply(lambda x: x.mean((1, 2))), nn.Linear(width, 1000)]
    return nn.Sequential(*parts, *last)


class Scale(nn.Module):
    """A factor for each channel."""

    def __init__(self, width: int) -> None:
        nn.Module.__init__(self)
        self.factor = nn.Parameter(torch.rand(width, 1, 1) + 0.5)

    def forward(self, x: Any) -> Any:
        return x * self.factor


class Norm(nn.Module):
    """LayerNorm of the channels of images."""

    def __init__(self, width: int) -> None:
        nn.Module.__init__(self)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Any) -> Any:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def convnext(layers: Layers, *, width: int = 96) -> Any:
    """Liu et al. 2022, ConvNeXt-T."""
    parts: list[Any] = [nn.Conv2d(3, width, 4, 4), Norm(width)]
    for stage, count in enumerate(layers):
        if stage:
            parts += [Norm(width), nn.Conv2d(width, 2 * width, 2, 2)]
            width *= 2
        for _ in range(count):
            body = [nn.Conv2d(width, width, 7, padding=3, groups=width)]
            body += [Apply(lambda x: x.permute(0, 2, 3, 1)), nn.LayerNorm(width), mlp(width)]
            body += [Apply(lambda x: x.permute(0, 3, 1, 2)), Scale(width)]
            parts.append(Add(nn.Sequential(*body)))
    last = [nn.AdaptiveAvgPool2d(1), Norm(width), nn.Flatten(), nn.Linear(width, 1000)]
    return nn.Sequential(*parts, *last)


ZOO: dict[str, tuple[Callable[[Layers], Any], Layers, Layers, float]] = {
    "resnet18": (lambda n: resnet(n, bottleneck=False), (2, 2, 2, 2), (1, 1, 1, 1), 0.27),
    "resnet50": (lambda n: resnet(n, bottleneck=True), (3, 4, 6, 3), (1, 1, 1, 1), 0.27),
    "resnext50": (
        lambda n: resnet(n, bottleneck=True, groups=32, base=128),
        (3, 4, 6, 3),
        (1, 1, 1, 1),
        0.27,
    ),
    "densenet121": (densenet, (6, 12, 24, 16), (2, 2, 2, 2), 0.29),
    "shufflenet_v2": (shufflenet, (4, 8, 4), (2, 2, 2), 0.50),
    "mobilenet_v2": (mobilenet, (1, 2, 3, 4, 3, 3, 1), (1, 2, 1, 1, 1, 2, 1), 0.35),
    "squeezenet1_1": (squeezenet, (2, 2, 4), (2, 2, 4), 0.36),
    "swin_t": (swin, (2, 2, 6, 2), (2, 2, 2, 2), 0.27),
    "vit_b_16": (vit, (12,), (2,), 0.27),
    "convnext_tiny": (convnext, (3, 3, 9, 3), (1, 1, 1, 1), 0.27),
}
"""Name → how it is built, blocks of each stage, fewer of them, the share of parameters that half
the channels should leave at most."""


def export(name: str, path: Path, *, small: bool = False, opset: int = 17) -> None:
    """Write a network of the zoo, for one image of 224 pixels, as torch's legacy exporter does."""
    build, full, few, _ = ZOO[name]
    torch.manual_seed(0)
    model = build(few if small else full).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        bias = getattr(module, "bias", None)
        if bias is not None:
            nn.init.normal_(bias, 0, 0.1)
    image = torch.randn(1, 3, 224, 224)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (image,),
            str(path),
            input_names=["image"],
            output_names=["scores"],
            opset_version=opset,
            dynamo=False,
        )
