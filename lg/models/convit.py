"""ConViT: a vision transformer whose first blocks start out as convolutions, on timm.

Source: d'Ascoli et al., "ConViT: Improving Vision Transformers with Soft Convolutional Inductive
Biases", arXiv 2103.10697.

Shapes: B batch, N tokens, C channels, M heads.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.convit import GPSA, MHSA, ConVit
from torch import nn

from lg.models.backbone import Backbone, MapLayout
from lg.models.layers import check_heads, check_patches, split_heads


class GatedAttention(nn.Module):
    """Gated positional self-attention: each head mixes attention by content and by position.

    Layers, weights and numbers are those of timm's GPSA, which repeats the positional attention,
    the same for all images, for every image; this computes it once per batch. On CUDA the two
    attentions are applied to the values separately and the results are mixed. The sum is the same,
    and the content part can be fused, without an N x N matrix in memory. On CPUs it is faster to
    mix the attentions first.

    Args:
        source: The layer whose parameters this one uses.
        num_tokens: N.
    """

    def __init__(self, source: GPSA, *, num_tokens: int) -> None:
        super().__init__()
        self.num_heads = source.num_heads
        self.scale = source.scale
        self.gating_param = source.gating_param
        self.qk, self.v, self.proj = source.qk, source.v, source.proj
        self.pos_proj = source.pos_proj
        self.attn_drop, self.proj_drop = source.attn_drop, source.proj_drop
        # [N, N, 3]: column distance, row distance and squared distance of any two tokens
        distances = source.get_rel_indices(num_tokens)[0]
        self.register_buffer("distances", distances, persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens [B, N, C] to [B, N, C]."""
        value = split_heads(self.v(tokens), self.num_heads)
        dropped = self.training and self.attn_drop.p > 0  # dropout needs the mixed attention
        if tokens.is_cuda and not dropped:
            heads = self.mix_results(tokens, value)
        else:
            heads = self.attn_drop(self.get_attention(tokens)) @ value
        return self.proj_drop(self.proj(heads.transpose(1, 2).flatten(2)))

    def mix_results(self, tokens: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return the attended values [B, M, N, C / M] without forming the mixed attention."""
        query, key = self._query_and_key(tokens)
        content = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        # One product per head, with the images side by side: [M, N, N] x [M, N, B C / M].
        beside = value.permute(1, 2, 0, 3).flatten(2)
        position = self._positional().to(value.dtype) @ beside
        position = position.unflatten(2, (len(tokens), -1)).permute(2, 0, 1, 3)
        return torch.lerp(content, position, self._gate().to(content.dtype))

    def get_attention(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the attention weights [B, M, N, N] for tokens [B, N, C]; no dropout."""
        query, key = self._query_and_key(tokens)
        content = (self.scale * query @ key.transpose(2, 3)).softmax(dim=-1)
        gate = self._gate()
        return (1 - gate) * content + gate * self._positional()

    def _query_and_key(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        query, key = self.qk(tokens).chunk(2, dim=-1)
        return split_heads(query, self.num_heads), split_heads(key, self.num_heads)

    def _positional(self) -> torch.Tensor:
        """Return the attention [M, N, N] by position alone."""
        return self.pos_proj(self.distances).permute(2, 0, 1).softmax(dim=-1)

    def _gate(self) -> torch.Tensor:
        """Return the weight [M, 1, 1] of the positional attention."""
        return torch.sigmoid(self.gating_param)[:, None, None]


def convit(
    *,
    img_size: int,
    in_channels: int = 3,
    num_classes: int,
    patch_size: int,
    hidden_dim: int,
    depth: int,
    num_heads: int,
    mlp_ratio: float,
    local_layers: int = 10,
    locality_strength: float = 1.0,
    ln_eps: float = 1e-6,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    attention_drop_rate: float = 0.0,
) -> Backbone:
    """Return a ConViT.

    Args: as in `lg.models.backbone`, where the largest square number of heads in `num_heads` start
    as the positions of a convolution's kernel, and:
        local_layers: Blocks with gated attention, before the class token joins; less than `depth`.
        locality_strength: Initial focus of these heads on their position, > 0.
    """
    check_patches(img_size, [patch_size])
    check_heads([hidden_dim], [num_heads])
    if not 0 <= local_layers < depth:
        raise ValueError(
            f"local_layers is {local_layers} with depth {depth}: the class token joins after the "
            f"local layers and needs at least one more block; use {depth - 1} or less"
        )
    net = ConVit(
        img_size=img_size,
        patch_size=patch_size,
        in_chans=in_channels,
        num_classes=num_classes,
        embed_dim=hidden_dim // num_heads,  # timm multiplies it by num_heads
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
        pos_drop_rate=drop_rate,
        proj_drop_rate=drop_rate,
        attn_drop_rate=attention_drop_rate,
        drop_path_rate=drop_path_rate,
        norm_layer=partial(nn.LayerNorm, eps=ln_eps),  # type: ignore[arg-type]
        local_up_to_layer=local_layers,
        locality_strength=locality_strength,
    )
    side = img_size // patch_size
    _replace_attention(net, local_layers, num_tokens=side**2, dim=hidden_dim)
    return Backbone(
        net,
        family="ConViT",
        block_names=[f"blocks.{index}" for index in range(depth)],
        layouts=[
            MapLayout("tokens", hidden_dim, int(index >= local_layers), (side, side))
            for index in range(depth)
        ],
    )


def _replace_attention(net: ConVit, local_layers: int, *, num_tokens: int, dim: int) -> None:
    """Replace timm's attention by gated attention for one image size, and by fused attention."""
    for index, block in enumerate(net.blocks):
        if index < local_layers:
            block.attn = GatedAttention(block.attn, num_tokens=num_tokens)  # type: ignore[arg-type]
        else:
            block.attn = _fused(block.attn, dim)  # type: ignore[arg-type]


def _fused(source: MHSA, dim: int) -> Attention:
    """Return timm's `Attention`, which can be fused, with the layers of ConViT's `MHSA`."""
    attention = Attention(dim, num_heads=source.num_heads)
    for part in ("qkv", "attn_drop", "proj", "proj_drop"):
        setattr(attention, part, getattr(source, part))
    return attention
