"""Images scored once, where nothing of them is needed a second time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flawmap.datasets import Sample
from flawmap.imaging.reading import BATCH
from flawmap.learning.data import Progress, quiet
from flawmap.line import Inspector
from flawmap.tuning.sweep import Batch, Labelled, figures_of, labelled


class Scorer:
    """Scores labelled images by the network of an inspector, keeping neither them nor their features.

    Captures are not checked: a synthetic defect may be larger than any that a camera sees.

    Attributes:
        labels: of the images scored so far, True for those with a defect.
    """

    def __init__(self, inspector: Inspector) -> None:
        self.inspector, self.preparation = inspector, inspector.card.preparation
        self.labels: list[bool] = []

    def scored(self, images: Iterable[Labelled]) -> Iterator[Batch]:
        """The windows of all images, in order, as `Sweep.scored` gives them."""
        waiting: list[_Window] = []
        for image in images:
            self.labels.append(image.defective)
            waiting += self._windows(image)
            while len(waiting) >= BATCH:
                yield self._run(waiting[:BATCH])
                waiting = waiting[BATCH:]
        if waiting:
            yield self._run(waiting)

    def _windows(self, image: Labelled) -> Iterator[_Window]:
        placement = self.preparation.place(image.pixels)
        inputs, shown = self.preparation.inputs(image.pixels, placement), placement.inside()
        none = None if image.defective else np.zeros(self.preparation.size, np.bool_)
        masks = [none] * len(shown) if image.mask is None else placement.project(image.mask)
        for pixels, inside, mask in zip(inputs, shown, masks, strict=True):
            yield _Window(len(self.labels) - 1, pixels, inside, mask)

    def _run(self, windows: Sequence[_Window]) -> Batch:
        inputs, shown = np.stack([w.pixels for w in windows]), np.stack([w.inside for w in windows])
        inside = shown[:, None].astype(np.float32) if self.preparation.masked else None
        *maps, scores, _ = self.inspector.engine(inputs, inside)
        return Batch(
            [w.image for w in windows],
            maps[0][:, 0] if maps else np.zeros(shown.shape, np.float32),
            scores,
            [w.mask for w in windows],
            None if inside is None else shown,
        )

    def figures(self, samples: Sequence[Sample], progress: Progress = quiet) -> dict[str, float]:
        """Each of `flawmap.tuning.sweep.FIGURES` of labelled test images, in 0..1; nan where it does not exist."""

        def told() -> Iterator[Batch]:
            for batch in self.scored(labelled(sample) for sample in samples):
                progress("oracle", len(self.labels), len(samples))
                yield batch

        return figures_of(told(), self.labels, self.inspector.card.localises)


class _Window(NamedTuple):
    """One model input of the image of a number, where it is scored, and the defect on it."""

    image: int
    pixels: NDArray[Any]  # (3, h, w)
    inside: NDArray[np.bool_]  # (h, w)
    mask: NDArray[np.bool_] | None  # (h, w)
