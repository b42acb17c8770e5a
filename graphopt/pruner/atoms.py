"""Union-find over positions of axes, vectorised.

An atom is one index of one axis of one tensor; atoms that only make sense together are united.
Hook and compress as in Shiloach and Vishkin 1982, An O(log n) parallel connectivity algorithm:
the larger root is hooked on the smaller, and paths are halved, for whole arrays at a time.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["Atoms", "Axis", "fixed"]

Axis = npt.NDArray[np.int64]
"""The atoms along one axis, in order. Atom 0 is never pruned; of unknown size: no atoms."""


def fixed(size: int) -> Axis:
    """An axis that cannot be pruned."""
    return np.zeros(size, np.int64)


class Atoms:
    """Atoms, which of them belong together, and why some may not be pruned."""

    def __init__(self) -> None:
        self._parent: Axis = np.zeros(1024, np.int64)
        self._frozen: Axis = np.zeros(1024, np.int64)
        self._inexact = np.zeros(1024, np.bool_)
        self._count = 1
        self.reasons = ["", "fixed"]
        self._frozen[0] = 1

    def __len__(self) -> int:
        return self._count

    def fresh(self, size: int) -> Axis:
        """New atoms for an axis, each by itself; an axis of one element is never pruned."""
        if size <= 1:
            return fixed(size)
        start, self._count = self._count, self._count + size
        while self._count > len(self._parent):
            self._parent = np.concatenate([self._parent, np.zeros_like(self._parent)])
            self._frozen = np.concatenate([self._frozen, np.zeros_like(self._frozen)])
            self._inexact = np.concatenate([self._inexact, np.zeros_like(self._inexact)])
        made = np.arange(start, self._count, dtype=np.int64)
        self._parent[made] = made
        return made

    def roots(self, axis: Axis) -> Axis:
        """The representative of each atom's group."""
        found = self._parent[axis]
        while True:
            further = self._parent[found]
            if np.array_equal(further, found):
                return found
            self._parent[axis] = further
            found = further

    def unite(self, a: Axis, b: Axis, reason: str) -> None:
        """Atoms of equal positions belong together; `reason` tells why, if one is fixed."""
        if len(a) != len(b):
            raise ValueError(f"axes of {len(a)} and {len(b)} elements are to be the same")
        a, b = self.roots(a), self.roots(b)
        self._freeze(b[a == 0], reason)
        self._freeze(a[b == 0], reason)
        both = (a != b) & (a != 0) & (b != 0)
        a, b = a[both], b[both]
        while a.size:
            low, high = np.minimum(a, b), np.maximum(a, b)
            np.minimum.at(self._parent, high, low)
            into = self.roots(high)
            np.maximum.at(self._frozen, into, self._frozen[high])
            np.logical_or.at(self._inexact, into, self._inexact[high])
            a, b = self.roots(low), into
            apart = a != b
            a, b = a[apart], b[apart]

    def together(self, axis: Axis, reason: str) -> None:
        """All atoms of one array form one group."""
        if len(axis) > 1:
            self.unite(axis[1:], np.broadcast_to(axis[:1], axis[1:].shape), reason)

    def _freeze(self, roots: Axis, reason: str) -> None:
        roots = roots[self._frozen[roots] == 0]
        if roots.size:
            if self.reasons[-1] != reason:
                self.reasons.append(reason)
            self._frozen[roots] = len(self.reasons) - 1

    def freeze(self, axis: Axis, reason: str) -> None:
        """These atoms stay; the first reason given is the one that is told."""
        self._freeze(self.roots(axis), reason)

    def frozen(self, axis: Axis) -> Axis:
        """Per atom the number of the reason why it stays (see `reasons`), 0 where it may go."""
        return self._frozen[self.roots(axis)]

    def live(self, axis: Axis) -> bool:
        """Whether any atom may be pruned."""
        return bool(axis.size) and bool((self.frozen(axis) == 0).any())

    def doubt(self, axis: Axis) -> None:
        """Without these atoms the rest is computed otherwise: they took part in a statistic."""
        self._inexact[self.roots(axis)] = True

    def inexact(self, axis: Axis) -> npt.NDArray[np.bool_]:
        """Per atom whether `doubt` was told of its group."""
        return self._inexact[self.roots(axis)]
