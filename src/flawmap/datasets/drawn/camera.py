"""The camera: lens, exposure and tone first, sensor noise last, so that two scenes can be compared before the noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flawmap.datasets.drawn.noise import Plane

SUPERSAMPLING = 2  # surfaces are drawn this much larger than the picture


@dataclass(frozen=True)
class Camera:
    """`exposure` is a factor on the light, `cast` one for each of red, green and blue, `blur` the lens's Gaussian in
    picture pixels, `vignette` the loss of light in the corners, `read_noise` and `shot_noise` the sensor's deviations
    on the scale 0..1."""

    exposure: float
    cast: tuple[float, float, float]
    blur: float
    vignette: float
    read_noise: float
    shot_noise: float


def sample_camera(rng: np.random.Generator) -> Camera:
    """One of the settings that an inspection camera drifts through within a shift."""
    cast = tuple(rng.normal(1, 0.015, 3))
    return Camera(
        exposure=rng.uniform(0.85, 1.2),
        cast=(cast[0], cast[1], cast[2]),
        blur=rng.uniform(0.4, 0.85),
        vignette=rng.uniform(0.05, 0.22),
        read_noise=rng.uniform(0.004, 0.009),
        shot_noise=rng.uniform(0.008, 0.016),
    )


def develop(radiance: Plane, camera: Camera) -> Plane:
    """Linear light (3, 2H, 2W) -> the noiseless picture (3, H, W), float32 in 0..1, gamma-encoded."""
    from scipy.ndimage import gaussian_filter

    step = SUPERSAMPLING
    picture = np.zeros((3, radiance.shape[1] // step, radiance.shape[2] // step), dtype=np.float32)
    for row in range(step):
        for column in range(step):
            picture += radiance[:, row::step, column::step]
    picture *= np.float32(1 / step**2)
    scale = picture.shape[1] / 256
    for plane, gain in zip(picture, camera.cast, strict=True):
        gaussian_filter(plane, camera.blur * scale, output=plane, truncate=3)
        plane *= np.float32(gain * camera.exposure)
    axis = np.linspace(-1, 1, picture.shape[1], dtype=np.float32) ** 2
    picture *= 1 - np.float32(camera.vignette / 2) * (axis[:, None] + axis[None, :])
    encoded: Plane = np.clip(picture, 0, 1, out=picture) ** np.float32(1 / 2.2)
    return encoded


def expose(picture: Plane, camera: Camera, rng: np.random.Generator) -> np.ndarray:
    """The noiseless picture (3, H, W) in 0..1 -> what the sensor reports, (H, W, 3) uint8."""
    deviation = np.sqrt(np.float32(camera.read_noise**2) + np.float32(camera.shot_noise**2) * picture)
    noisy = picture + deviation * rng.standard_normal(picture.shape, dtype=np.float32)
    return np.ascontiguousarray(np.rint(np.clip(noisy, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0))
