"""Training batches of good model inputs and of copies with a synthetic defect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flawmap.learning.data import TrainingData
from flawmap.methods import SyntheticDefects
from flawmap.synthesis import TextureFolder, draw_texture, find_foreground, looked_at, synthesize

_KEPT = 256_000_000  # bytes of inputs in memory; what goes beyond is read anew each time


class DefectiveBatches:
    """Makes batches of the model inputs `rows` of `data`, as `SyntheticDefects` says."""

    def __init__(self, data: TrainingData, rows: Sequence[int], inputs: SyntheticDefects) -> None:
        self._data = data
        self._inputs = inputs
        preprocessing = data.prepare.preprocessing
        self._mean = np.array(preprocessing.mean, np.float32)
        self._std = np.array(preprocessing.std, np.float32)
        self._textures = draw_texture if inputs.textures is None else TextureFolder(inputs.textures)
        self._kept: dict[int, tuple[NDArray[np.float16], NDArray[np.bool_]]] = {}
        self._others = _Pixels(self, rows)
        shown = (self._others[i] for i in looked_at(len(rows)))
        self.foreground = find_foreground(shown) if inputs.foreground else None

    def __call__(self, rows: Sequence[int], rngs: Sequence[np.random.Generator]) -> tuple[list[Tensor], Tensor | None]:
        """The batch of some rows, each with its own generator, as `SyntheticDefects` describes it, and `inside`."""
        good, defective, masks, inside = [], [], [], []
        for row, rng in zip(rows, rngs, strict=True):
            pixels, scored = self.window(row)
            image, mask = pixels, np.zeros(scored.shape, np.bool_)
            if rng.random() >= self._inputs.clean:
                region = scored if self.foreground is None else scored & self.foreground.mask(pixels)
                image, mask, _ = synthesize(
                    pixels, rng, self._others, region=region, textures=self._textures, settings=self._inputs.settings
                )
            good.append(self._normalised(pixels))
            defective.append(self._normalised(image))
            masks.append(mask[None])
            inside.append(scored[None])
        tensors = [torch.from_numpy(np.stack(part).astype(np.float32)) for part in (good, defective, masks, inside)]
        return tensors[:3], tensors[3] if self._data.prepare.masked else None

    def window(self, row: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Pixels (h, w, 3) in 0..1 of one model input, and where it is scored (h, w)."""
        if row in self._kept:
            return self._kept[row][0].astype(np.float32), self._kept[row][1]
        exact, scored = self._data.pixels(row)
        pixels = exact.astype(np.float16)
        if (len(self._kept) + 1) * (pixels.nbytes + scored.nbytes) <= _KEPT:
            self._kept[row] = pixels, scored
        return pixels.astype(np.float32), scored

    def _normalised(self, pixels: NDArray[Any]) -> NDArray[np.float32]:
        normalised: NDArray[np.float32] = ((pixels - self._mean) / self._std).transpose(2, 0, 1)
        return normalised


class _Pixels(Sequence[NDArray[Any]]):
    """The pixels of some rows, made as they are asked for."""

    def __init__(self, batches: DefectiveBatches, rows: Sequence[int]) -> None:
        self._batches, self._rows = batches, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._batches.window(self._rows[index])[0]
