"""A 24-layer BERT as torch's legacy exporter writes it, with dynamic batch and sequence.

    python -m tests.benchmarks.bert OUT.onnx [--layers 24] [--hidden 64]

Its weights are random and it is narrow: what is measured is the graph, some 2,000 nodes of which
more than half compute shapes. Needs torch and onnx, and nothing of graphopt, so that it can be
made in an environment of its own.
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

VOCABULARY, POSITIONS, TYPES = 1000, 512, 2


class Embeddings(nn.Module):
    """Words, positions and token types, added and normalized."""

    def __init__(self, hidden: int) -> None:
        nn.Module.__init__(self)
        self.words = nn.Embedding(VOCABULARY, hidden)
        self.positions = nn.Embedding(POSITIONS, hidden)
        self.types = nn.Embedding(TYPES, hidden)
        self.norm = nn.LayerNorm(hidden, eps=1e-12)
        self.register_buffer("position_ids", torch.arange(POSITIONS).expand((1, -1)))

    def forward(self, ids: Any, types: Any) -> Any:
        places = self.position_ids[:, : ids.size()[1]]
        return self.norm(self.words(ids) + self.types(types) + self.positions(places))


class Attention(nn.Module):
    """Self-attention with separate projections, reshaped as Hugging Face's BERT does."""

    def __init__(self, hidden: int, heads: int) -> None:
        nn.Module.__init__(self)
        self.heads, self.size = heads, hidden // heads
        self.query, self.key, self.value = (nn.Linear(hidden, hidden) for _ in range(3))
        self.output = nn.Linear(hidden, hidden)
        self.norm = nn.LayerNorm(hidden, eps=1e-12)

    def split(self, x: Any) -> Any:
        return x.view((*x.size()[:-1], self.heads, self.size)).permute(0, 2, 1, 3)

    def forward(self, x: Any, mask: Any) -> Any:
        query, key, value = (self.split(f(x)) for f in (self.query, self.key, self.value))
        scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(self.size)
        weights = torch.softmax(scores + mask, dim=-1)
        context = torch.matmul(weights, value).permute(0, 2, 1, 3).contiguous()
        context = context.view((*context.size()[:-2], self.heads * self.size))
        return self.norm(self.output(context) + x)


class Layer(nn.Module):
    """Attention, then two dense layers with GELU between."""

    def __init__(self, hidden: int, heads: int) -> None:
        nn.Module.__init__(self)
        self.attention = Attention(hidden, heads)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
        self.norm = nn.LayerNorm(hidden, eps=1e-12)

    def forward(self, x: Any, mask: Any) -> Any:
        x = self.attention(x, mask)
        return self.norm(self.down(nn.functional.gelu(self.up(x))) + x)


class Bert(nn.Module):
    """Token states and the pooled first one."""

    def __init__(self, layers: int, hidden: int) -> None:
        nn.Module.__init__(self)
        self.embeddings = Embeddings(hidden)
        self.layers = nn.ModuleList(Layer(hidden, 4) for _ in range(layers))
        self.pooler = nn.Linear(hidden, hidden)

    def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> tuple[Any, Any]:
        mask = attention_mask[:, None, None, :].to(torch.float32)
        mask = (1.0 - mask) * torch.finfo(torch.float32).min
        x = self.embeddings(input_ids, token_type_ids)
        for layer in self.layers:
            x = layer(x, mask)
        return x, torch.tanh(self.pooler(x[:, 0]))


def export(path: Path, layers: int = 24, hidden: int = 64, opset: int = 17) -> None:
    """Write the model; the same weights each time."""
    torch.manual_seed(0)
    model = varied(Bert(layers, hidden))
    ids = torch.randint(0, VOCABULARY, (2, 16))
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }
    outputs = ["last_hidden_state", "pooler_output"]
    axes = {name: {0: "batch", 1: "sequence"} for name in (*inputs, outputs[0])}
    axes[outputs[1]] = {0: "batch"}
    write(model, inputs, path, outputs, axes, opset)


if __name__ == "__main__":
    main(__doc__, export)
