"""Pruning: which indices of which axes belong together, what they are worth, and taking them out."""
