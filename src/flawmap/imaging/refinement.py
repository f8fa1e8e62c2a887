"""Poses refined by Gauss-Newton steps, at one resolution. Needs numpy and Pillow only."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flawmap.imaging.rigid import Pose, transformed

_STEPS = 10  # of Gauss-Newton on one level
_LONGEST_STEP = 3.0  # pixels; beyond, the linear model holds no more
_SETTLED = 0.01  # pixels


class Level:
    """The template at one resolution, with what each Gauss-Newton step needs of it."""

    def __init__(self, edges: NDArray[np.float32]) -> None:
        self.edges = edges
        self._slopes = np.gradient(edges) if min(edges.shape) > 1 else [np.zeros_like(edges)] * 2

    def refine(
        self,
        image: NDArray[np.float32],
        pose: Pose,
        template_centre: tuple[float, float],
        image_centre: tuple[float, float],
        limit: float,
    ) -> tuple[float, Pose]:
        """The pose nearby at which gain * template + offset is closest to the image, and its quality.

        Inverse compositional Gauss-Newton (Baker & Matthews, "Lucas-Kanade 20 years on", 2004, section 3.2), with gain
        and offset solved for in each step.
        """
        height, width = self.edges.shape
        down, across = self._slopes
        y = (np.arange(height, dtype=np.float32) + np.float32(0.5 - template_centre[1]))[:, None]
        x = np.arange(width, dtype=np.float32) + np.float32(0.5 - template_centre[0])
        radius = max(height, width) / 2  # turns the unknown angle into pixels at the rim
        turning = (x * down - y * across) / np.float32(radius)
        columns = np.stack([turning, across, down, self.edges, np.ones_like(self.edges)]).reshape(5, -1)
        ones = np.ones_like(image)

        def warp(plane: NDArray[np.float32]) -> NDArray[np.float32]:
            data = pose.to_image(template_centre, image_centre)
            return transformed(Image.fromarray(plane), (height, width), data)

        for _ in range(_STEPS):
            weighted = columns * warp(ones).ravel()
            normal, right = weighted @ columns.T, weighted @ warp(image).ravel()
            solved = np.linalg.lstsq(normal.astype(np.float64), right.astype(np.float64), rcond=1e-7)[0]
            gain = float(solved[3])
            if gain <= 0:
                break
            turn, dx, dy = np.clip(solved[:3] / gain, -_LONGEST_STEP, _LONGEST_STEP).tolist()
            angle = pose.angle - turn / radius
            if limit < math.pi:
                angle = min(max(angle, -limit), limit)
            cos, sin = math.cos(angle), math.sin(angle)
            pose = Pose(angle, pose.x - cos * dx + sin * dy, pose.y - sin * dx - cos * dy)
            if max(abs(turn), abs(dx), abs(dy)) < _SETTLED:
                break
        return _correlation(self.edges, warp(image), warp(ones)), pose


def _correlation(template: NDArray[np.float32], image: NDArray[np.float32], covered: NDArray[np.float32]) -> float:
    """The normalised cross-correlation where `covered` is 1, times the share of the template's norm that lies there.

    Else a good match of the template's empty half would count as much as one of the part.
    """
    inside = covered > 0.5
    if not inside.any():
        return 0.0
    a, b = template[inside] - template[inside].mean(), image[inside] - image[inside].mean()
    norm = math.sqrt(float(np.sum((template - template.mean()) ** 2)) * float(b @ b))
    return float(a @ b) / norm if norm > 0 else 0.0
