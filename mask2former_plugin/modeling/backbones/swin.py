"""Swin Transformer backbone (Liu et al., 2021) with fused attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mask2former_plugin.modeling.layers.linear import Linear, token_wise

# added to the attention logits between parts of a window that do not belong together
SEPARATION = -100.0


class DropPath(nn.Module):
    """Drops the whole residual branch of a sample during training (stochastic depth)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        kept = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
        return x * (kept / keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class Mlp(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width]`` to the same."""
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x)))))


def relative_position_index(window: int) -> Tensor:
    """Row of the bias table for each pair of places in a window, ``[window², window²]``."""
    place = torch.arange(window)
    y, x = (grid.flatten() for grid in torch.meshgrid(place, place, indexing="ij"))
    dy = y[:, None] - y[None, :] + window - 1
    dx = x[:, None] - x[None, :] + window - 1
    return dy * (2 * window - 1) + dx


class WindowAttention(nn.Module):
    """Multi-head attention inside windows with a learned bias for each relative position."""

    relative_position_index: Tensor

    def __init__(
        self,
        width: int,
        window: int,
        num_heads: int,
        *,
        qkv_bias: bool,
        qk_scale: float | None,
        attn_drop: float,
        drop: float,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(
                f"MODEL.SWIN: the width {width} of a stage must be a multiple of its number of heads {num_heads}"
            )
        self.num_heads = num_heads
        self.scale = qk_scale or (width // num_heads) ** -0.5
        self.attn_drop = attn_drop
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_position_index(window))
        self.qkv = Linear(width, 3 * width, bias=qkv_bias)
        self.proj = Linear(width, width)
        self.proj_drop = nn.Dropout(drop)

    def forward(self, windows: Tensor, groups: Sequence[tuple[int, Tensor | None]]) -> Tensor:
        """
        Args:
            windows: ``[N, window², C]``.
            groups: how many of the windows, one group after the other, share which mask ``[window², window²]`` (None:
                no mask).

        Returns:
            ``[N, window², C]``.
        """
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        # [1, heads, window², window²]; the fused attention of CPUs wants four dimensions without gaps
        bias = bias.unsqueeze(0).contiguous()
        qkv = (
            self.qkv(windows).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        )  # [3, N, heads, window², d]
        attended = []
        for part, (_, separation) in zip(qkv.split([count for count, _ in groups], dim=1), groups):
            q, k, v = part
            mask = (bias if separation is None else bias + separation).to(q.dtype)
            attended.append(
                F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, dropout_p=self.attn_drop if self.training else 0.0, scale=self.scale
                )
            )
        joined = attended[0] if len(attended) == 1 else torch.cat(attended)
        return self.proj_drop(self.proj(joined.transpose(1, 2).flatten(2)))


def separation_masks(window: int, shift: int) -> Tensor:
    """Masks of the windows that a cyclic shift fills with parts from opposite ends of the map.

    Only the last row and the last column of windows are concerned, so three masks serve maps of every size.

    Returns:
        ``[3, window², window²]``: windows of the last column, of the last row, and the one that is in both.
    """
    wrapped = torch.arange(window) >= window - shift
    rows, columns = (grid.flatten() for grid in torch.meshgrid(wrapped, wrapped, indexing="ij"))
    parts = torch.stack((columns.long(), rows.long(), 2 * rows.long() + columns.long()))
    return (parts[:, :, None] != parts[:, None, :]).float() * SEPARATION


def to_windows(x: Tensor, window: int) -> Tensor:
    """``[B, H, W, C]``, H and W multiples of ``window``, to ``[B·H·W/window², window², C]``."""
    x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))
    return x.transpose(2, 3).flatten(0, 2).flatten(1, 2)


def from_windows(windows: Tensor, window: int, batch: int, height: int, width: int) -> Tensor:
    """Inverse of :func:`to_windows`, ``[B, H, W, C]``."""
    x = windows.reshape(batch, height // window, width // window, window, window, -1)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class SwinBlock(nn.Module):
    """Attention in (shifted) windows and feed-forward, both on normalised input, with residuals."""

    separation: Tensor

    def __init__(
        self, width: int, num_heads: int, window: int, shift: int, mlp_ratio: float, drop_path: float, **attention: Any
    ) -> None:
        super().__init__()
        self.window = window
        self.shift = shift
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, window, num_heads, **attention)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio), attention["drop"])
        if shift:
            self.register_buffer("separation", separation_masks(window, shift), persistent=False)

    def _regions(self, height: int, width: int) -> list[tuple[slice, slice, Tensor | None]]:
        """Rows and columns of the (padded) map whose windows share a mask, with the mask."""
        everything = slice(None)
        if not self.shift:
            return [(everything, everything, None)]
        last_column, last_row, corner = self.separation
        inner, edge = slice(None, -self.window), slice(-self.window, None)
        regions = [
            (inner, inner, None, (height > self.window and width > self.window)),
            (inner, edge, last_column, height > self.window),
            (edge, inner, last_row, width > self.window),
            (edge, edge, corner, True),
        ]
        return [(rows, columns, mask) for rows, columns, mask, present in regions if present]

    def _attend(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        window, shift = self.window, self.shift
        x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
        if shift:
            x = x.roll((-shift, -shift), dims=(1, 2))
        regions = self._regions(x.shape[1], x.shape[2])
        parts = [to_windows(x[:, rows, columns], window) for rows, columns, _ in regions]
        groups = [(part.shape[0], mask) for part, (_, _, mask) in zip(parts, regions)]
        attended = self.attn(parts[0] if len(parts) == 1 else torch.cat(parts), groups)
        output = torch.empty_like(x, dtype=attended.dtype)
        for part, (rows, columns, _) in zip(attended.split([count for count, _ in groups]), regions):
            area = output[:, rows, columns]
            area.copy_(from_windows(part, window, batch, area.shape[1], area.shape[2]))
        if shift:
            output = output.roll((shift, shift), dims=(1, 2))
        return output[:, :height, :width]

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C]`` to the same."""
        x = x + self.drop_path(self._attend(self.norm1(x)))
        return x + self.drop_path(token_wise(self._feed, x, hidden=self.mlp.fc1.out_features))

    def _feed(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    """Halves the resolution and doubles the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C]`` to ``[B, ceil(H/2), ceil(W/2), 2C]``; odd sizes are padded with zeros."""
        _, height, width, _ = x.shape
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        # the order of the published weights: even columns (even rows, odd rows), then odd columns
        x = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], dim=3)
        return self.reduction(self.norm(x))


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens."""

    def __init__(self, patch_size: int, in_channels: int, width: int, norm: bool) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(width) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, ceil(H/patch), ceil(W/patch), width]``."""
        _, _, height, width = x.shape
        x = F.pad(x, (0, -width % self.patch_size, 0, -height % self.patch_size))
        x = self.proj(x).permute(0, 2, 3, 1)
        return x if self.norm is None else self.norm(x)


class SwinStage(nn.Module):
    """Blocks of one resolution, unshifted and shifted in turn, and the step to the next resolution."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        window: int,
        drop_paths: Sequence[float],
        merge: bool,
        mlp_ratio: float,
        **attention: Any,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            SwinBlock(width, num_heads, window, window // 2 if number % 2 else 0, mlp_ratio, rate, **attention)
            for number, rate in enumerate(drop_paths)
        )
        self.downsample = PatchMerging(width) if merge else None


@BACKBONE_REGISTRY.register()
class D2SwinTransformer(Backbone):
    """Swin Transformer with outputs "res2" … "res5" at strides 4 … 32.

    Stages after the last output do not run. Their parameters, and the norms of outputs that were not asked for, exist
    for the checkpoint's sake but need no gradient.
    """

    @configurable
    def __init__(
        self,
        *,
        in_channels: int = 3,
        pretrain_img_size: int = 224,
        patch_size: int = 4,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.3,
        ape: bool = False,
        patch_norm: bool = True,
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        use_checkpoint: bool = False,
    ) -> None:
        """
        Args:
            in_channels: channels of the image.
            pretrain_img_size: side of the images in pre-training; gives the size of the absolute position embedding.
            patch_size: side of a patch.
            embed_dim: channels of the first stage, doubled from stage to stage.
            depths: number of blocks per stage.
            num_heads: number of heads per stage.
            window_size: side of a window.
            mlp_ratio: hidden width of the feed-forward layers over the width of the stage.
            qkv_bias: whether queries, keys and values have a bias.
            qk_scale: factor of the attention logits; None for head width ** -0.5.
            drop_rate: dropout of tokens.
            attn_drop_rate: dropout of attention weights.
            drop_path_rate: stochastic depth of the last block; grows linearly from 0.
            ape: add an absolute position embedding.
            patch_norm: normalise the patch embedding.
            out_features: names of the outputs.
            use_checkpoint: recompute the blocks in the backward pass to save memory.

        Raises:
            ValueError: an output name is unknown.
        """
        super().__init__()
        names = [f"res{number + 2}" for number in range(len(depths))]
        unknown = [name for name in out_features if name not in names]
        if unknown or not out_features:
            raise ValueError(f"MODEL.SWIN.OUT_FEATURES must name some of {names}, got {list(out_features)}")
        if len(num_heads) != len(depths):
            raise ValueError(
                f"MODEL.SWIN.DEPTHS {list(depths)} and MODEL.SWIN.NUM_HEADS {list(num_heads)} differ in length"
            )
        self.use_checkpoint = use_checkpoint
        self.patch_embed = PatchEmbed(patch_size, in_channels, embed_dim, patch_norm)
        self.absolute_pos_embed = None
        if ape:
            side = pretrain_img_size // patch_size
            self.absolute_pos_embed = nn.Parameter(torch.empty(1, embed_dim, side, side))
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)
        self.pos_drop = nn.Dropout(drop_rate)

        blocks = sum(depths)
        rates = iter(drop_path_rate * number / max(blocks - 1, 1) for number in range(blocks))
        widths = [embed_dim * 2**number for number in range(len(depths))]
        self.layers = nn.ModuleList(
            SwinStage(
                widths[number],
                num_heads[number],
                window_size,
                [next(rates) for _ in range(depths[number])],
                number + 1 < len(depths),
                mlp_ratio,
                qkv_bias=qkv_bias,
                qk_scale=qk_scale,
                attn_drop=attn_drop_rate,
                drop=drop_rate,
            )
            for number in range(len(depths))
        )
        for number, width in enumerate(widths):
            self.add_module(f"norm{number}", nn.LayerNorm(width))

        self._out_features = list(out_features)
        self._out_feature_channels = dict(zip(names, widths))
        self._out_feature_strides = {name: patch_size * 2**number for number, name in enumerate(names)}
        self._names = names
        self._freeze_unused()

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        swin = cfg.MODEL.SWIN
        return {
            "in_channels": input_shape.channels,
            "pretrain_img_size": swin.PRETRAIN_IMG_SIZE,
            "patch_size": swin.PATCH_SIZE,
            "embed_dim": swin.EMBED_DIM,
            "depths": swin.DEPTHS,
            "num_heads": swin.NUM_HEADS,
            "window_size": swin.WINDOW_SIZE,
            "mlp_ratio": swin.MLP_RATIO,
            "qkv_bias": swin.QKV_BIAS,
            "qk_scale": swin.QK_SCALE,
            "drop_rate": swin.DROP_RATE,
            "attn_drop_rate": swin.ATTN_DROP_RATE,
            "drop_path_rate": swin.DROP_PATH_RATE,
            "ape": swin.APE,
            "patch_norm": swin.PATCH_NORM,
            "out_features": swin.OUT_FEATURES,
            "use_checkpoint": swin.USE_CHECKPOINT,
        }

    @property
    def size_divisibility(self) -> int:
        """Padding images to a multiple of this keeps all strides exact; the network itself takes any size."""
        return 32

    def _last_stage(self) -> int:
        return max(self._names.index(name) for name in self._out_features)

    def _freeze_unused(self) -> None:
        """Parameters that no output depends on get no gradient, which distributed training would wait for."""
        last = self._last_stage()
        unused = [
            self.get_submodule(f"norm{n}") for n, name in enumerate(self._names) if name not in self._out_features
        ]
        unused += list(self.layers[last + 1 :])
        if self.layers[last].downsample is not None:
            unused.append(self.layers[last].downsample)
        for module in unused:
            module.requires_grad_(False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """
        Args:
            x: ``[B, 3, H, W]``; sizes need not be multiples of anything.

        Returns:
            ``[B, C_i, ceil(H/s_i), ceil(W/s_i)]`` by name.
        """
        x = self.patch_embed(x)
        if self.absolute_pos_embed is not None:
            embed = F.interpolate(self.absolute_pos_embed, size=x.shape[1:3], mode="bicubic", align_corners=False)
            x = x + embed.permute(0, 2, 3, 1)
        x = self.pos_drop(x)
        outputs = {}
        last = self._last_stage()
        for number, stage in enumerate(self.layers[: last + 1]):
            for block in stage.blocks:
                recompute = self.use_checkpoint and self.training and torch.is_grad_enabled()
                x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
            name = self._names[number]
            if name in self._out_features:
                outputs[name] = self.get_submodule(f"norm{number}")(x).permute(0, 3, 1, 2)
            if number < last:
                x = stage.downsample(x)
        return outputs
