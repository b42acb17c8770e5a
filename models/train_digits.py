"""Train the two shipped networks on scikit-learn's digits and export them as torch does.

    pip install -e '.[train]'
    python models/train_digits.py [FOLDER]

Writes digits_cnn.onnx, digits_transformer.onnx and digits_test.npz into FOLDER (this one, unless
told otherwise) and prints the held-out accuracy. Everything is seeded; the weights still differ
in their last bits between versions of torch and between machines. Takes about a minute on one
core.

The networks are exported the way they are found in the wild, with nothing fused: batch
normalization beside its convolution, explicit padding, layer normalization, GELU and attention
spelled out, and shapes computed in the graph from a dynamic batch.

Data: "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, UCI machine learning
repository (CC BY 4.0), as shipped in scikit-learn (BSD-3-Clause).
"""

from __future__ import annotations

import argparse
import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np

# mypy: allow-subclassing-any
# torch and scikit-learn are no dependencies of the project, so type checkers do not see them
torch: Any = importlib.import_module("torch")
datasets: Any = importlib.import_module("sklearn.datasets")
model_selection: Any = importlib.import_module("sklearn.model_selection")
nn: Any = torch.nn

SEED = 0
HELD_OUT = 450
BATCH = 64


class Residual(nn.Module):
    """Two 3x3 convolutions, each with batch normalization, and a way around them."""

    def __init__(self, channels: int) -> None:
        nn.Module.__init__(self)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Any) -> Any:
        """[batch, channels, height, width] to the same."""
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(x + self.norm2(self.conv2(y)))


class Cnn(nn.Module):
    """A residual network of six convolutions; the strided one is padded as TensorFlow pads."""

    def __init__(self, width: int = 32) -> None:
        nn.Module.__init__(self)
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.block1 = Residual(width)
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, bias=False)
        self.down_norm = nn.BatchNorm2d(2 * width)
        self.block2 = Residual(2 * width)
        self.dropout = nn.Dropout(0.2)
        self.classify = nn.Linear(2 * width, 10)

    def forward(self, image: Any) -> Any:
        """[batch, 1, 8, 8] in 0..1 to [batch, 10] logits."""
        x = torch.relu(self.norm(self.stem(image)))
        x = self.block1(x)
        x = self.down_norm(self.down(self.pad(x)))
        x = x * torch.clamp(x + 3.0, 0.0, 6.0) / 6.0
        x = self.block2(x)
        x = x.mean((2, 3), keepdim=True)
        x = x.reshape(x.shape[0], x.shape[1])
        return self.classify(self.dropout(x))


class LayerNorm(nn.Module):
    """Layer normalization over the last axis, spelled out."""

    def __init__(self, width: int) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Any) -> Any:
        """[..., width] to the same."""
        centred = x - x.mean(-1, keepdim=True)
        variance = (centred**2).mean(-1, keepdim=True)
        return centred / torch.sqrt(variance + 1e-5) * self.weight + self.bias


class Layer(nn.Module):
    """A pre-norm transformer layer, attention and erf-GELU spelled out."""

    def __init__(self, width: int, heads: int) -> None:
        nn.Module.__init__(self)
        self.heads = heads
        self.scale = math.sqrt(width / heads)
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.expand, self.shrink = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(0.1)

    def split(self, x: Any) -> Any:
        """[batch, tokens, width] to [batch, heads, tokens, width / heads]."""
        batch, tokens, width = x.shape
        return x.view(batch, tokens, self.heads, width // self.heads).transpose(1, 2)

    def forward(self, x: Any) -> Any:
        """[batch, tokens, width] to the same."""
        y = self.norm1(x)
        query, key, value = (self.split(f(y)) for f in (self.query, self.key, self.value))
        scores = query @ key.transpose(-1, -2) / self.scale
        y = (torch.softmax(scores, -1) @ value).transpose(1, 2)
        x = x + self.dropout(self.out(y.reshape(x.shape[0], x.shape[1], x.shape[2])))
        y = self.expand(self.norm2(x))
        y = 0.5 * y * (1.0 + torch.erf(y / math.sqrt(2.0)))
        return x + self.dropout(self.shrink(y))


class Transformer(nn.Module):
    """A vision transformer on sixteen patches of 2x2 pixels and a class token."""

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        nn.Module.__init__(self)
        self.embed = nn.Linear(4, width)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        self.layers = nn.ModuleList([Layer(width, heads) for _ in range(layers)])
        self.norm = LayerNorm(width)
        self.classify = nn.Linear(width, 10)

    def forward(self, image: Any) -> Any:
        """[batch, 1, 8, 8] in 0..1 to [batch, 10] logits."""
        batch = image.shape[0]
        patches = image.reshape(batch, 4, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(batch, 16, 4)
        x = torch.cat([self.token.expand(batch, -1, -1), self.embed(patches)], 1) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.classify(self.norm(x)[:, 0])


def shifted(images: Any) -> Any:
    """Each image of [batch, 1, 8, 8] moved by up to one pixel both ways, zeros moving in."""
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    corners = torch.randint(0, 3, (len(images), 2)).tolist()
    return torch.stack(
        [p[:, i : i + 8, j : j + 8] for p, (i, j) in zip(padded, corners, strict=True)]
    )


def train(model: Any, images: Any, labels: Any, epochs: int, rate: float) -> None:
    """AdamW with a one-cycle rate; half of each batch is shifted."""
    steps = epochs * math.ceil(len(images) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(BATCH):
            batch = images[chosen]
            half = len(batch) // 2
            batch = torch.cat([shifted(batch[:half]), batch[half:]])
            loss = torch.nn.functional.cross_entropy(
                model(batch), labels[chosen], label_smoothing=0.05
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def accuracy(model: Any, images: Any, labels: Any) -> float:
    """Share of images whose largest logit is the label's."""
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def export(model: Any, path: Path, opset: int) -> None:
    """Write the model with a dynamic batch, as the tracing exporter leaves it, unfused."""
    torch.onnx.export(
        model,
        (torch.zeros(2, 1, 8, 8),),
        path,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        opset_version=opset,
        training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False,
        dynamo=False,
    )


def main() -> None:
    """Train, export and report both networks."""
    parser = argparse.ArgumentParser(description="Train the shipped digit classifiers.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).resolve().parent)
    folder: Path = parser.parse_args().folder
    torch.manual_seed(SEED)
    digits = datasets.load_digits()
    images = (digits.images[:, None] / 16.0).astype(np.float32)
    labels = digits.target.astype(np.int64)
    split = model_selection.train_test_split(
        images, labels, test_size=HELD_OUT, random_state=SEED, stratify=labels
    )
    train_x, test_x, train_y, test_y = (torch.from_numpy(part) for part in split)
    np.savez_compressed(folder / "digits_test.npz", image=test_x.numpy(), labels=test_y.numpy())
    for name, model, opset, epochs, rate in (
        ("digits_cnn", Cnn(), 17, 30, 4e-3),
        ("digits_transformer", Transformer(), 20, 80, 2e-3),
    ):
        train(model, train_x, train_y, epochs, rate)
        export(model, folder / f"{name}.onnx", opset)
        print(f"{name}: held-out accuracy {accuracy(model, test_x, test_y):.4f}")


if __name__ == "__main__":
    main()
