"""Pruning: which indices of which axes belong together, what they are worth, taking them out."""
