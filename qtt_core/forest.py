"""Extremely randomised trees as flat arrays: fitted with scikit-learn, evaluated with numpy.

The learner behind the transfer prior (10-optimizer 5.3). Fitting happens in `metatrain` only;
optimizers load the arrays and never need scikit-learn. No pickle is involved anywhere.

    n   rows        D   columns        K   outputs of one row        B   trees
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qtt_core.encoding import Array

LEAF = -1
"""Marks a node without children, in `feature`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forest:
    """All trees one after the other; children are positions in the same arrays."""

    roots: NDArray[np.int32]
    """(B,)"""
    feature: NDArray[np.int16]
    """(nodes,), LEAF for a leaf."""
    threshold: NDArray[np.float32]
    """(nodes,): a row goes left if its value is not above it."""
    left: NDArray[np.int32]
    right: NDArray[np.int32]
    value: NDArray[np.float32]
    """(nodes, K)"""

    def predict(self, x: Array) -> Array:
        """Mean over trees, (n, K)."""
        return np.asarray(self._leaves(x).mean(axis=1), dtype=np.float64)

    def spread(self, x: Array) -> Array:
        """Deviation between trees, (n, K): small where they agree."""
        return np.asarray(self._leaves(x).std(axis=1), dtype=np.float64)

    def _leaves(self, x: Array) -> NDArray[np.float32]:
        """Value of the leaf that each row reaches in each tree, (n, B, K)."""
        rows = x.astype(np.float32)
        at = np.broadcast_to(self.roots, (len(rows), len(self.roots))).copy()
        line = np.arange(len(rows))[:, None]
        while True:
            feature = self.feature[at]
            inner = feature != LEAF
            if not inner.any():
                return self.value[at]
            below = rows[line, np.maximum(feature, 0)] <= self.threshold[at]
            at = np.where(inner, np.where(below, self.left[at], self.right[at]), at)

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """What `from_arrays` takes, for npz."""
        return {
            "roots": self.roots, "feature": self.feature, "threshold": self.threshold,
            "left": self.left, "right": self.right, "value": self.value,
        }  # fmt: skip

    @staticmethod
    def from_arrays(arrays: Mapping[str, NDArray[np.generic]]) -> Forest:
        """The forest of `arrays`. Raises: KeyError; ValueError for children outside the arrays."""
        forest = Forest(
            roots=arrays["roots"].astype(np.int32),
            feature=arrays["feature"].astype(np.int16),
            threshold=arrays["threshold"].astype(np.float32),
            left=arrays["left"].astype(np.int32),
            right=arrays["right"].astype(np.int32),
            value=arrays["value"].astype(np.float32),
        )
        count = len(forest.feature)
        inner = forest.feature != LEAF
        # Children lie behind their parent: else a damaged file would send `predict` in circles.
        for children in (forest.left[inner], forest.right[inner]):
            if np.any(children <= np.flatnonzero(inner)) or np.any(children >= count):
                raise ValueError("a tree's children lie outside its arrays")
        return forest


def fit_forest(
    x: Array,
    y: Array,
    *,
    seed: int,
    weights: Array | None = None,
    trees: int = 100,
    leaf: int = 3,
    columns: float = 0.6,
    bootstrap: bool = True,
) -> Forest:
    """Trees fitted to (n, D) rows and (n,) or (n, K) targets; `leaf`: rows in a leaf at least.

    Source: Geurts, Ernst, Wehenkel, Extremely randomized trees, Machine Learning 63 (2006).
    """
    from sklearn.ensemble import (  # type: ignore[import-untyped]
        ExtraTreesRegressor,
    )

    model = ExtraTreesRegressor(
        n_estimators=trees, min_samples_leaf=leaf, max_features=columns, bootstrap=bootstrap,
        random_state=seed & 0x7FFFFFFF,
    )  # fmt: skip
    model.fit(x.astype(np.float32), y, sample_weight=weights)
    found = [estimator.tree_ for estimator in model.estimators_]
    offsets = np.cumsum([0, *(tree.node_count for tree in found)])
    return Forest(
        roots=offsets[:-1].astype(np.int32),
        feature=np.concatenate([_features(tree) for tree in found]),
        threshold=np.concatenate([tree.threshold.astype(np.float32) for tree in found]),
        left=_children([tree.children_left for tree in found], offsets),
        right=_children([tree.children_right for tree in found], offsets),
        value=np.concatenate([tree.value[:, :, 0].astype(np.float32) for tree in found]),
    )


def _features(tree: object) -> NDArray[np.int16]:
    feature = tree.feature  # type: ignore[attr-defined]  # scikit-learn ships no types
    return np.where(feature < 0, LEAF, feature).astype(np.int16)


def _children(children: list[NDArray[np.int64]], offsets: NDArray[np.int64]) -> NDArray[np.int32]:
    shifted = [c + offset for c, offset in zip(children, offsets, strict=False)]
    return np.concatenate(shifted).astype(np.int32)
