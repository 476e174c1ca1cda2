"""A palette of colours that are easy to tell apart."""

from __future__ import annotations

import functools

import numpy as np

PALETTE_SIZE = 74
GRID_STEPS = 9
LIGHTNESS_RANGE = (35, 90)  # of 0..100, so that black and white text and outlines stay visible on every colour

__all__ = ["colormap", "random_color", "random_colors"]


def colormap(rgb: bool = False, maximum: int = 255) -> np.ndarray:
    """The palette, the most different colours first.

    Args:
        rgb: channels in the order RGB, otherwise BGR.
        maximum: 255 or 1, the value of a full channel.

    Returns:
        (74, 3) float32.
    """
    if maximum not in (1, 255):
        raise ValueError(f"maximum must be 1 or 255, got {maximum}")
    colors = _palette() * maximum
    return colors if rgb else colors[:, ::-1].copy()


def random_color(rgb: bool = False, maximum: int = 255) -> np.ndarray:
    """One colour of the palette by chance (NumPy's global generator), (3,) float32."""
    return colormap(rgb, maximum)[np.random.randint(PALETTE_SIZE)]


def random_colors(N: int, rgb: bool = False, maximum: int = 255) -> list[np.ndarray]:
    """``N`` colours of the palette by chance, no colour twice before all have occurred once."""
    palette = colormap(rgb, maximum)
    rounds = [np.random.permutation(PALETTE_SIZE) for _ in range(-(-N // PALETTE_SIZE))]
    return [palette[index] for index in np.concatenate(rounds)[:N]] if N else []


@functools.lru_cache(maxsize=1)
def _palette() -> np.ndarray:
    """RGB in 0..1: from a grid of colours, always the one that is farthest (in CIELAB) from those chosen before."""
    steps = np.linspace(0, 1, GRID_STEPS)
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _rgb_to_lab(grid)
    visible = (lab[:, 0] >= LIGHTNESS_RANGE[0]) & (lab[:, 0] <= LIGHTNESS_RANGE[1])
    grid, lab = grid[visible], lab[visible]
    # Grey is what every photograph is full of; start from it and leave it out.
    distance = np.linalg.norm(lab - np.array([60.0, 0.0, 0.0]), axis=1)
    chosen = []
    for _ in range(PALETTE_SIZE):
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
    return grid[chosen].astype(np.float32)


def _rgb_to_lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB in 0..1 (N, 3) to CIELAB with white point D65."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / to_xyz.sum(axis=1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)
