"""Quantization: ranges from sketches of activations, placement by target, recovery of accuracy."""
