"""Multi-layer perceptron."""

from __future__ import annotations

from torch import Tensor, nn

from mask2former_plugin.modeling.layers.linear import Linear, linear_relu


class MLP(nn.Module):
    """Linear layers with ReLU between them, none after the last."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_layers: int) -> None:
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
        self.layers = nn.ModuleList(Linear(a, b) for a, b in zip(widths, widths[1:]))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_dim]`` to ``[..., out_dim]``."""
        *hidden, last = self.layers
        for layer in hidden:
            x = linear_relu(x, layer)
        return last(x)
