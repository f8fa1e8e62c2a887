"""Exact nearest neighbours in a memory bank, by blocked matrix products."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 1024  # queries and bank vectors multiplied at a time: the product stays in the cache until its maxima are taken
_COLUMNS = 512


def search_index(vectors: Tensor) -> Tensor:
    """(M, D) -> (M, D + 1): each vector b followed by -|b|^2 / 2.

    The product with a query q followed by 1 is q b - |b|^2 / 2, largest for the nearest b.
    """
    return torch.cat([vectors, -vectors.square().sum(1, keepdim=True) / 2], 1)


def nearest(queries: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest vector of each query.

    Which of several equal vectors is named is not said: a product rounds otherwise at another place of a matrix.
    Its distance is taken from the difference itself: the expanded square has no digits left near zero.

    Args:
        queries: (N, D) float32 or float64.
        index: (M, D + 1), `search_index` of the vectors, M >= 1.

    Returns:
        Euclidean distances (N,) and indices (N,) int64.
    """
    if torch.onnx.is_in_onnx_export():
        # Engines are slow at finding the position of a maximum, and drop it where nobody reads it. The expanded square
        # is off by some millionths of |q|^2, which matters only for patches that the bank itself holds.
        product = torch.addmm(index[:, -1], queries, index[:, :-1].T)
        squared = queries.square().sum(1) - 2 * product.amax(1)
        return squared.clamp_min(0).sqrt(), product.argmax(1)
    rows = F.pad(queries, (0, 1), value=1.0)  # (N, D + 1)
    indices = torch.cat([_nearest_indices(part, index) for part in rows.split(_ROWS)])
    return (queries - index[indices, :-1]).square().sum(1).sqrt(), indices


def _nearest_indices(rows: Tensor, index: Tensor) -> Tensor:
    if rows.device.type != "cpu":
        return (rows @ index.T).argmax(1)
    # On a CPU, NumPy multiplies such shapes faster than PyTorch, and finds the position of a maximum ten times as fast.
    queries, vectors = rows.numpy(), index.numpy()
    buffer = np.empty(len(queries) * min(_COLUMNS, len(vectors)), queries.dtype)
    best, indices = np.full(len(queries), -np.inf, queries.dtype), np.zeros(len(queries), np.int64)
    every = np.arange(len(queries))
    for start in range(0, len(vectors), _COLUMNS):
        part = vectors[start : start + _COLUMNS]
        product = np.matmul(queries, part.T, out=buffer[: len(queries) * len(part)].reshape(len(queries), len(part)))
        at = product.argmax(1)
        value = product[every, at]
        indices = np.where(value > best, at + start, indices)
        best = np.maximum(best, value)
    return torch.from_numpy(indices)


def k_nearest(queries: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest vectors of each of a few queries: distances (N, k), ascending, and indices (N, k) int64."""
    products = F.pad(queries, (0, 1), value=1.0) @ index.T
    indices = products.topk(min(k, len(index)), dim=1).indices
    distances = (queries[:, None] - index[indices, :-1]).square().sum(2).sqrt()
    order = distances.argsort(1)
    return distances.gather(1, order), indices.gather(1, order)
