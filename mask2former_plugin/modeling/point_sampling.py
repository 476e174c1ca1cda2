"""Points on masks: drawing them, sampling logits there, preferring the uncertain ones (PointRend)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# A draw of more values than this (8 MB) is repeated when needed instead of being kept until then.
_KEPT_VALUES = 2**21


class DeferredRand:
    """``torch.rand(*shape)`` whose place in the random stream is fixed now and whose values are wanted later.

    Matching all predictions at once needs their points before the points of the losses, while one seed shall give the
    numbers of matching and loss taking turns. Large draws are thrown away and repeated from the saved generator
    state, so that memory does not grow with the number of predictions.
    """

    def __init__(self, *shape: int, device: torch.device) -> None:
        self._shape, self._device = shape, device
        self._state = None
        repeatable = device.type in ("cpu", "cuda")
        if repeatable and torch.Size(shape).numel() > _KEPT_VALUES:
            self._state = torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)
            torch.rand(*shape, device=device)
        else:
            self._values = torch.rand(*shape, device=device)

    def values(self) -> Tensor:
        """The values, the same at every call."""
        if self._state is None:
            return self._values
        generator = torch.Generator(self._device)
        generator.set_state(self._state)
        return torch.rand(*self._shape, device=self._device, generator=generator)


def sample_logits(logits: Tensor, points: Tensor) -> Tensor:
    """Logits ``[N, h, w]`` at points ``[N, P, 2]``, (x, y) in [0, 1]; bilinear, zero outside; gives ``[N, P]``."""
    grid = 2.0 * points.to(logits.dtype) - 1.0
    return F.grid_sample(logits.unsqueeze(1), grid.unsqueeze(1), align_corners=False)[:, 0, 0]


@torch.no_grad()
def uncertain_points(logits: Tensor, candidates: Tensor, num_uncertain: int, random_points: Tensor) -> Tensor:
    """The candidates whose logit is nearest to zero, then the random points (Mask2Former, section 3.3; PointRend).

    Args:
        logits: ``[N, h, w]``.
        candidates: ``[N, M, 2]``.
        num_uncertain: how many candidates of each mask are taken.
        random_points: ``[N, R, 2]``.

    Returns:
        ``[N, num_uncertain + R, 2]``.
    """
    certainty = sample_logits(logits, candidates).abs()
    chosen = certainty.topk(num_uncertain, dim=1, largest=False).indices
    return torch.cat([candidates.gather(1, chosen.unsqueeze(2).expand(-1, -1, 2)), random_points], dim=1)
