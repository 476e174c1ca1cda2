"""A canvas of the size of an image, to draw on with matplotlib."""

from __future__ import annotations

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


class VisImage:
    """An image under a matplotlib axis in its coordinates (x to the right, y down, pixels are unit squares)."""

    def __init__(self, img: np.ndarray, scale: float = 1.0) -> None:
        """
        Args:
            img: (H, W, 3) RGB, 0..255.
            scale: size of the output over the size of the image.
        """
        self.img = img
        self.scale = scale
        self.height, self.width = img.shape[:2]
        self.fig = Figure(frameon=False)
        self.dpi = self.fig.get_dpi()
        # The small addition keeps rounding from losing a row or a column.
        self.fig.set_size_inches((self.width * scale + 1e-2) / self.dpi, (self.height * scale + 1e-2) / self.dpi)
        self.canvas = FigureCanvasAgg(self.fig)
        self.ax = self.fig.add_axes((0.0, 0.0, 1.0, 1.0))
        self.ax.axis("off")
        self.ax.set_xlim(0.0, self.width)
        self.ax.set_ylim(self.height, 0.0)
        self.reset_image(img)

    def reset_image(self, img: np.ndarray) -> None:
        """Put another image of the same size beneath what is drawn."""
        self.ax.imshow(
            img.clip(0, 255).astype(np.uint8),
            extent=(0, self.width, self.height, 0),
            interpolation="nearest",
            aspect="auto",
        )

    def save(self, filepath: str) -> None:
        """Write to a file in the format that its ending names."""
        self.fig.savefig(filepath)

    def get_image(self) -> np.ndarray:
        """(H * scale, W * scale, 3) uint8 RGB."""
        buffer, (width, height) = self.canvas.print_to_buffer()
        return np.frombuffer(buffer, dtype=np.uint8).reshape(height, width, 4)[..., :3].copy()
