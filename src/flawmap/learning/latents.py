"""Latents of good images, by which a method whose settings can still be moved is calibrated anew without the images."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flawmap.learning.data import COLLECTED, TrainingData, batches, on_device
from flawmap.methods import Method


@dataclass(frozen=True)
class Latents:
    """What `Method.latents` made of some model inputs.

    Attributes:
        values: (N, T, C) float16, of N inputs.
        inside: (N, 1, H, W) bool, where they are scored; None for everywhere.
        digests: (N) of the image each input belongs to; inputs of one image stand together.
    """

    values: Tensor
    inside: Tensor | None
    digests: list[str]

    @classmethod
    @torch.inference_mode()
    def of(cls, method: Method, data: TrainingData, images: Sequence[int], device: str) -> Latents:
        """Those of some images whose features are cached."""
        values, masks = [], []
        for part in batches(data.rows(images), COLLECTED):
            features, inside = on_device(data.features(part), device)
            values.append(method.latents(features, inside).half().cpu())
            if inside is not None:
                masks.append(inside.bool().cpu())
        digests = [data.digests[i] for i in images for _ in data.rows([i])]
        return cls(torch.cat(values), torch.cat(masks) if masks else None, digests)

    def only(self, digests: Collection[str]) -> Latents:
        """Those of some images."""
        kept = [row for row, digest in enumerate(self.digests) if digest in digests]
        inside = None if self.inside is None else self.inside[kept]
        return Latents(self.values[kept], inside, [self.digests[row] for row in kept])

    @torch.inference_mode()
    def good_scores(self, method: Method, device: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Score and map maximum (n,) of each image, as `method` is set now."""
        best: dict[str, tuple[float, float]] = {}
        for rows in batches(range(len(self.digests)), COLLECTED):
            part = slice(rows[0], rows[-1] + 1)
            inside = None if self.inside is None else self.inside[part].float().to(device)
            anomaly_map, scores = method.score_latents(self.values[part].float().to(device), inside)
            peaks = method.enlarge(anomaly_map, inside).amax((1, 2, 3)).tolist()
            for digest, score, peak in zip(self.digests[part], scores.tolist(), peaks, strict=True):
                before = best.get(digest, (score, peak))
                best[digest] = (max(score, before[0]), max(peak, before[1]))
        found = np.array(list(best.values()), np.float32).reshape(-1, 2)
        return found[:, 0].copy(), found[:, 1].copy()
