"""Multi-head attention on fused scaled-dot-product attention, with the parameter names of ``nn.MultiheadAttention``."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mask2former_plugin.modeling.layers.linear import Linear, fused_linear, fuses, linear

# scores that are treated at once: 8 MB
_SCORES = 2**21
# a score that is lower by this much has no weight
_NEVER = 1e30


class MultiheadAttention(nn.Module):
    """Batch-first multi-head attention that never builds the attention matrix where the device can avoid it.

    Computes what ``nn.MultiheadAttention`` computes, from the same parameters (``in_proj_weight``, ``in_proj_bias``,
    ``out_proj``). The boolean mask is shared by the heads and says where a query may look.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        """
        Args:
            embed_dim: channels of queries, keys, values and output.
            num_heads: number of heads; must divide ``embed_dim``.
            dropout: probability of dropping an attention weight during training.

        Raises:
            ValueError: ``num_heads`` does not divide ``embed_dim``.
        """
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"the attention width {embed_dim} must be a multiple of the number of heads {num_heads}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim))
        self.out_proj = Linear(embed_dim, embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights, zero biases."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.in_proj_bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
        """
        Args:
            query: ``[B, Q, C]``.
            key: ``[B, S, C]``; pass the very same tensor as ``query`` for self-attention, it saves a product.
            value: ``[B, S, C]``.
            allowed: bool, ``[B, 1, Q, S]``: True where the query may attend. A row without True gives no defined
                output.

        Returns:
            ``[B, Q, C]``.
        """
        width = self.embed_dim
        if query is not key and fuses(key, self.in_proj_weight) and not (self.training and self.dropout):
            return self.out_proj(self._attend_without_gradients(query, key, value, allowed))
        if query is key:
            q, k = linear(query, self.in_proj_weight[: 2 * width], self.in_proj_bias[: 2 * width]).chunk(2, dim=2)
        else:
            q = linear(query, self.in_proj_weight[:width], self.in_proj_bias[:width])
            k = linear(key, self.in_proj_weight[width : 2 * width], self.in_proj_bias[width : 2 * width])
        v = linear(value, self.in_proj_weight[2 * width :], self.in_proj_bias[2 * width :])
        q, k, v = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, dropout_p=self.dropout if self.training else 0.0
        )
        return self.out_proj(attended.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}"

    def _attend_without_gradients(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None) -> Tensor:
        """The heads' results side by side, ``[B, Q, C]``, for what :func:`fuses` on CPUs.

        Twice as fast as the fused attention there: all products go through oneDNN, a head at a time, with keys and
        values as rows of channels. A bias of the keys would add the same to all scores of a query, which changes no
        weight; that of the values comes last, since the weights sum up to 1. Scores and softmax are in float32.
        """
        of_query, of_key, of_value = self.in_proj_weight.split(self.embed_dim)
        bias_of_query, _, bias_of_value = self.in_proj_bias.split(self.embed_dim)
        q = linear(query.to(of_query.dtype), of_query, bias_of_query).unflatten(2, (self.num_heads, -1))
        q = q.float().div_(math.sqrt(q.shape[3])).transpose(1, 2).contiguous()
        length = max(1, _SCORES // key.shape[1])
        images = []
        for image in range(len(q)):
            keys = fused_linear(of_key, key[image]).float().chunk(self.num_heads)
            values = fused_linear(of_value, value[image]).chunk(self.num_heads)
            mask = None if allowed is None else allowed[image, 0].float().sub_(1).mul_(_NEVER).split(length)
            heads = []
            for of_head, k, v in zip(q[image], keys, values):
                parts = []
                for number, part in enumerate(of_head.split(length)):
                    scores = fused_linear(part, k.t())
                    if mask is not None:
                        scores += mask[number]
                    parts.append(fused_linear(scores.softmax(1).to(v.dtype), v))
                heads.append(torch.cat(parts))
            images.append(torch.cat(heads, dim=1))
        return torch.stack(images).add_(bias_of_value)
