"""A 24-layer Llama-like decoder with a KV cache as torch's legacy exporter writes it, all dynamic.

    python -m tests.benchmarks.llama OUT.onnx [--layers 24] [--hidden 64]

Root-mean-square normalization spelled out, rotary embeddings by `rotate_half`, keys and values
shared by groups of heads, a causal mask computed from the lengths, SwiGLU. Its weights are random
and it is narrow: what is measured is the graph, some 2,500 nodes of which a third compute shapes.
Needs torch and onnx, and nothing of graphopt, so that it can be made in an environment of its own.
"""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

from tests.benchmarks._torch_export import main, varied, write

# mypy: allow-subclassing-any
# torch is no dependency of the project, so type checkers do not see it
torch: Any = importlib.import_module("torch")
nn: Any = torch.nn

VOCABULARY, HEADS, GROUPS = 1000, 4, 2


class Norm(nn.Module):
    """Root-mean-square normalization from its parts."""

    def __init__(self, hidden: int) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Any) -> Any:
        return self.weight * (x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def rotate_half(x: Any, size: int) -> Any:
    """(a, b) as (-b, a)."""
    a, b = x[..., : size // 2], x[..., size // 2 :]
    return torch.cat((-b, a), dim=-1)


def repeat_kv(x: Any, times: int, size: int) -> Any:
    """Each head as often as a group has queries."""
    x = x[:, :, None, :, :].expand(-1, -1, times, -1, -1)
    return x.reshape(1, HEADS, -1, size)


class Attention(nn.Module):
    """Grouped-query attention over the past and what is new."""

    def __init__(self, hidden: int) -> None:
        nn.Module.__init__(self)
        self.size = hidden // HEADS
        self.query = nn.Linear(hidden, hidden, bias=False)
        self.key, self.value = (nn.Linear(hidden, hidden // GROUPS, bias=False) for _ in range(2))
        self.output = nn.Linear(hidden, hidden, bias=False)

    def split(self, x: Any, heads: int) -> Any:
        return x.view(1, -1, heads, self.size).transpose(1, 2)

    def forward(self, x: Any, mask: Any, angles: Any, past: Any) -> Any:
        query = self.split(self.query(x), HEADS)
        key, value = (self.split(f(x), HEADS // GROUPS) for f in (self.key, self.value))
        cos, sin = (table.unsqueeze(1) for table in angles)
        query = query * cos + rotate_half(query, self.size) * sin
        key = key * cos + rotate_half(key, self.size) * sin
        key, value = (torch.cat(pair, dim=2) for pair in zip(past, (key, value), strict=True))
        keys, values = (repeat_kv(x, GROUPS, self.size) for x in (key, value))
        scores = torch.matmul(query, keys.transpose(2, 3)) / math.sqrt(self.size)
        weights = torch.softmax(scores + mask, dim=-1)
        context = torch.matmul(weights, values).transpose(1, 2).contiguous()
        return self.output(context.reshape(1, -1, HEADS * self.size)), key, value


class Layer(nn.Module):
    """Attention, then a gated dense part."""

    def __init__(self, hidden: int) -> None:
        nn.Module.__init__(self)
        self.attention = Attention(hidden)
        self.gate, self.up = (nn.Linear(hidden, 3 * hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * hidden, hidden, bias=False)
        self.before, self.between = Norm(hidden), Norm(hidden)

    def forward(self, x: Any, mask: Any, angles: Any, past: Any) -> Any:
        y, key, value = self.attention(self.before(x), mask, angles, past)
        x = x + y
        y = self.between(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y)), key, value


class Llama(nn.Module):
    """Logits, and the keys and values of each layer."""

    def __init__(self, layers: int, hidden: int) -> None:
        nn.Module.__init__(self)
        self.words = nn.Embedding(VOCABULARY, hidden)
        self.layers = nn.ModuleList(Layer(hidden) for _ in range(layers))
        self.norm, self.head = Norm(hidden), nn.Linear(hidden, VOCABULARY, bias=False)
        size = hidden // HEADS
        frequencies = 10000 ** (-torch.arange(0, size, 2).float() / size)
        self.register_buffer("frequencies", frequencies)

    def angles(self, places: Any, x: Any) -> tuple[Any, Any]:
        wide = self.frequencies[None, :, None].expand(places.shape[0], -1, 1)
        angles = (wide @ places[:, None, :].float()).transpose(1, 2)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    def mask(self, attention_mask: Any, x: Any, past: Any) -> Any:
        length, total = x.shape[1], past.shape[2] + x.shape[1]
        low = torch.finfo(x.dtype).min
        mask = torch.full((length, total), low)
        columns = torch.arange(total)
        rows = torch.arange(past.shape[2], total)
        mask = mask * (columns > rows.reshape(-1, 1))
        mask = mask[None, None, :, :].expand(x.shape[0], 1, -1, -1)
        padding = mask[:, :, :, : attention_mask.shape[-1]] + attention_mask[:, None, None, :]
        return mask.masked_fill(padding == 0, low)

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, *past: Any) -> Any:
        x = self.words(input_ids)
        mask, angles = self.mask(attention_mask, x, past[0]), self.angles(position_ids, x)
        present: list[Any] = []
        for index, layer in enumerate(self.layers):
            x, key, value = layer(x, mask, angles, past[2 * index : 2 * index + 2])
            present += [key, value]
        return (self.head(self.norm(x)), *present)


def export(path: Path, layers: int = 24, hidden: int = 64, opset: int = 17) -> None:
    """Write the model; the same weights each time."""
    torch.manual_seed(0)
    model = varied(Llama(layers, hidden))
    ids, known = torch.randint(0, VOCABULARY, (1, 5)), 7
    places = torch.arange(known, known + 5).unsqueeze(0)
    pairs = [f"{index}.{part}" for index in range(layers) for part in ("key", "value")]
    past = [torch.randn(1, HEADS // GROUPS, known, hidden // HEADS) for _ in pairs]
    now = {
        "input_ids": ids,
        "attention_mask": torch.ones(1, known + 5),
        "position_ids": places,
    }
    inputs = now | {f"past.{p}": cache for p, cache in zip(pairs, past, strict=True)}
    outputs = ["logits", *(f"present.{p}" for p in pairs)]
    axes = {name: {1: "sequence"} for name in (*now, "logits")}
    axes["attention_mask"] = {1: "total"}
    axes |= {name: {2: "past"} for name in inputs if name not in now}
    axes |= {name: {2: "total"} for name in outputs[1:]}
    write(model, inputs, path, outputs, axes, opset)


if __name__ == "__main__":
    main(__doc__, export)
