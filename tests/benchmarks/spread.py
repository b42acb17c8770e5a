"""What quantization loses on a model whose channels were spread apart without a change of function.

    python -m tests.benchmarks.spread MODEL.onnx SAMPLES.npz [--held-out OTHERS.npz]

Channels between Conv -> Relu -> Conv are multiplied by 10**u, u uniform in -1.5..1.5, and divided
again. Both models go through `graphopt.quantize` with no options. Agreement with the float model,
SQNR and, where there are labels, accuracy are over the samples that are held out, by default the
second half of them all.
"""

from __future__ import annotations

import argparse

from graphopt import optimize, quantize
from graphopt.quantizer.scoring import score
from graphopt.samples import open_samples
from tests._spread import spread


def main() -> None:
    """Print a line for each of the two models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("samples")
    parser.add_argument("--held-out")
    arguments = parser.parse_args()
    plain = optimize(arguments.model, level=2, verify="off")
    wide, pairs = spread(plain)
    samples = open_samples(arguments.samples, plain)
    rows = list(samples)
    half = len(rows) if arguments.held_out else len(rows) // 2
    others = arguments.held_out or rows[half:]
    print(f"{pairs} pairs of convolutions spread")
    for name, model in (("plain", plain), ("spread", wide)):
        result = quantize(model, rows[:half], force=True, seconds=0)
        found = score(model, result, open_samples(others, model))
        print(f"{name:7} agreement {found.agreement:.4f}  {found.sqnr_db:.1f} dB", end="")
        labelled = found.before is not None
        print(f"  accuracy {found.after:.4f}, of floats {found.before:.4f}" if labelled else "")


if __name__ == "__main__":
    main()
