"""Encoder and decoder of DETR, batch-first, with its parameter names."""

from __future__ import annotations

from torch import Tensor, nn

from mask2former_plugin.modeling.layers.attention import MultiheadAttention
from mask2former_plugin.modeling.layers.linear import Linear, linear_relu, token_wise
from mask2former_plugin.modeling.recomputation import RunsLayers


def xavier_init(module: nn.Module) -> None:
    """Xavier-uniform for every parameter of ``module`` with more than one dimension."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


class TransformerEncoderLayer(nn.Module):
    """Self-attention and feed-forward, normalised after each residual (or before, with ``pre_norm``)."""

    def __init__(self, width: int, num_heads: int, feedforward: int, dropout: float, pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.dropout = nn.Dropout(dropout)
        self.self_attn = MultiheadAttention(width, num_heads, dropout)
        self.linear1 = Linear(width, feedforward)
        self.linear2 = Linear(feedforward, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)

    def _attend(self, x: Tensor, pos: Tensor) -> Tensor:
        query = x + pos
        return self.dropout(self.self_attn(query, query, x))

    def _feed(self, x: Tensor) -> Tensor:
        hidden = self.dropout(linear_relu(self.norm2(x) if self.pre_norm else x, self.linear1))
        x = x + self.dropout(self.linear2(hidden))
        return x if self.pre_norm else self.norm2(x)

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        """``x`` ``[B, S, C]`` and its position encoding ``[S, C]`` to ``[B, S, C]``."""
        if self.pre_norm:
            x = x + self._attend(self.norm1(x), pos)
        else:
            x = self.norm1(x + self._attend(x, pos))
        return token_wise(self._feed, x, hidden=self.linear1.out_features, module=self)


class TransformerDecoderLayer(nn.Module):
    """Self-attention of the queries, cross-attention to the memory and feed-forward."""

    def __init__(self, width: int, num_heads: int, feedforward: int, dropout: float, pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.dropout = nn.Dropout(dropout)
        self.self_attn = MultiheadAttention(width, num_heads, dropout)
        self.multihead_attn = MultiheadAttention(width, num_heads, dropout)
        self.linear1 = Linear(width, feedforward)
        self.linear2 = Linear(feedforward, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def _attend(self, x: Tensor, query_pos: Tensor) -> Tensor:
        query = x + query_pos
        return self.dropout(self.self_attn(query, query, x))

    def _look(self, x: Tensor, query_pos: Tensor, keys: Tensor, memory: Tensor) -> Tensor:
        return self.dropout(self.multihead_attn(x + query_pos, keys, memory))

    def _feed(self, x: Tensor) -> Tensor:
        return self.dropout(self.linear2(self.dropout(linear_relu(x, self.linear1))))

    def forward(self, x: Tensor, query_pos: Tensor, keys: Tensor, memory: Tensor) -> Tensor:
        """Queries ``[B, Q, C]``, positions ``[Q, C]``, memory ``[B, S, C]`` with (``keys``) and without position."""
        if self.pre_norm:
            x = x + self._attend(self.norm1(x), query_pos)
            x = x + self._look(self.norm2(x), query_pos, keys, memory)
            return x + self._feed(self.norm3(x))
        x = self.norm1(x + self._attend(x, query_pos))
        x = self.norm2(x + self._look(x, query_pos, keys, memory))
        return self.norm3(x + self._feed(x))


class TransformerEncoder(RunsLayers):
    """A stack of encoder layers; pre-norm ends with a norm of its own."""

    def __init__(
        self, num_layers: int, width: int, num_heads: int, feedforward: int, dropout: float, pre_norm: bool
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TransformerEncoderLayer(width, num_heads, feedforward, dropout, pre_norm) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width) if pre_norm else None
        xavier_init(self)

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        """``[B, S, C]`` and position encoding ``[S, C]`` to ``[B, S, C]``."""
        for layer in self.layers:
            x = self.run_layer(layer, x, pos)
        return x if self.norm is None else self.norm(x)


class TransformerDecoder(RunsLayers):
    """A stack of decoder layers whose outputs all go through one final norm."""

    def __init__(
        self, num_layers: int, width: int, num_heads: int, feedforward: int, dropout: float, pre_norm: bool
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TransformerDecoderLayer(width, num_heads, feedforward, dropout, pre_norm) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)
        xavier_init(self)

    def forward(self, x: Tensor, query_pos: Tensor, keys: Tensor, memory: Tensor) -> list[Tensor]:
        """The normalised output of every layer, each ``[B, Q, C]``."""
        outputs = []
        for layer in self.layers:
            x = self.run_layer(layer, x, query_pos, keys, memory)
            outputs.append(self.norm(x))
        return outputs
