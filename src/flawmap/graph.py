"""A method with all that inspection needs around it, as one network: pixels in, map, score and embedding out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flawmap.imaging.preprocessing import Preprocessing
from flawmap.methods import Method


class InspectionGraph(nn.Module):
    """Normalisation, backbone, method, enlarging, and the embedding by which captures of another part are known.

    Attributes:
        method: the fitted method.
        outputs: names of what `forward` returns, in order.
    """

    def __init__(self, method: Method, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.method: Method = method
        white = 1 if preprocessing.deep else 255
        std = torch.tensor(preprocessing.std).view(1, 3, 1, 1)
        self.register_buffer("gain", 1 / (white * std), persistent=False)
        self.register_buffer("offset", torch.tensor(preprocessing.mean).view(1, 3, 1, 1) / std, persistent=False)
        self.gain: Tensor
        self.offset: Tensor
        self.outputs = ("map", "score", "embedding") if method.localises else ("score", "embedding")

    def forward(self, images: Tensor, inside: Tensor | None = None) -> tuple[Tensor, ...]:
        """images (B, 3, H, W) uint8, or float32 in 0..1 -> map (B, 1, H, W), score (B,), embedding (B, M).

        A method that only says whether a part is good has no map.
        """
        features = self.method.features(images.float() * self.gain - self.offset, inside)
        anomaly_map, score = self.method.levelled(*self.method.score(features, inside), inside)
        pooled = torch.cat([features[i].mean((2, 3)) for i in self.method.backbone.medium], 1)
        if not self.method.localises:
            return score, pooled
        return self.method.enlarge(anomaly_map, inside), score, pooled
