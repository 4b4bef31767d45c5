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
from lg.models.layers import check_depth, check_patches, check_widths, split_heads


class GatedAttention(nn.Module):
    """Gated positional self-attention: each head mixes what it sees with where it looks.

    The same layers, weights and numbers as timm's GPSA, which works out the positional attention,
    the same for all images, for every one of them; here it is done once a batch. On CUDA the two
    attentions act on the values apart and the results are mixed, which is the same sum: so the
    content part can be fused and needs no N x N matrix in memory. On CPUs mixing first is faster.

    Args:
        source: The layer whose parts are taken over.
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
        # [N, N, 3]: column and row distance, and the square of both, between any two tokens
        distances = source.get_rel_indices(num_tokens)[0]
        self.register_buffer("distances", distances, persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [B, N, C] to [B, N, C]."""
        value = split_heads(self.v(tokens), self.num_heads)
        dropped = self.training and self.attn_drop.p > 0  # of the mixture, which must then exist
        if tokens.is_cuda and not dropped:
            heads = self.mix_results(tokens, value)
        else:
            heads = self.attn_drop(self.attention(tokens)) @ value
        return self.proj_drop(self.proj(heads.transpose(1, 2).flatten(2)))

    def mix_results(self, tokens: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return what the heads gather, [B, M, N, C / M], without the mixed attention."""
        query, key = self._query_and_key(tokens)
        content = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        # One product a head, with the images side by side: [M, N, N] x [M, N, B C / M].
        beside = value.permute(1, 2, 0, 3).flatten(2)
        position = self._positional().to(value.dtype) @ beside
        position = position.unflatten(2, (len(tokens), -1)).permute(2, 0, 1, 3)
        return torch.lerp(content, position, self._gate().to(content.dtype))

    def attention(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the attention weights [B, M, N, N] for tokens [B, N, C]; no dropout."""
        query, key = self._query_and_key(tokens)
        content = (self.scale * query @ key.transpose(2, 3)).softmax(dim=-1)
        gate = self._gate()
        return (1 - gate) * content + gate * self._positional()

    def _query_and_key(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        query, key = self.qk(tokens).chunk(2, dim=-1)
        return split_heads(query, self.num_heads), split_heads(key, self.num_heads)

    def _positional(self) -> torch.Tensor:
        """Attention [M, N, N] by place alone."""
        return self.pos_proj(self.distances).permute(2, 0, 1).softmax(dim=-1)

    def _gate(self) -> torch.Tensor:
        """Share of the positional attention, [M, 1, 1]."""
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

    Args:
        img_size: Height and width of the images in pixels, a multiple of `patch_size`.
        in_channels: Channels of the images.
        num_classes: K.
        patch_size: Height and width of a patch in pixels.
        hidden_dim: C, a multiple of `num_heads`.
        depth: Number of blocks.
        num_heads: Attention heads of each block; the largest square in it start as the places of
            a convolution's kernel.
        mlp_ratio: Width of the MLP over C.
        local_layers: Blocks with gated attention, before the class token joins; less than `depth`.
        locality_strength: How sharply these heads look at their place at the start, > 0.
        ln_eps: Added to the variance in LayerNorm.
        drop_rate: Dropout on the tokens after positions are added, after the projection of the
            attention and in the MLP.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0 at the first.
        attention_drop_rate: Dropout on the attention weights.

    Raises:
        ValueError: Sizes that do not fit together.
    """
    check_patches(img_size, patch_size)
    check_widths([hidden_dim], [num_heads])
    check_depth([depth])
    if not 0 <= local_layers < depth:
        raise ValueError(
            f"CONVIT.LOCAL_LAYERS is {local_layers} of TRANSFORMER.DEPTH {depth}: the class token "
            f"joins after them and needs a block left, use {depth - 1} or less"
        )
    net = ConVit(
        img_size=img_size,
        patch_size=patch_size,
        in_chans=in_channels,
        num_classes=num_classes,
        embed_dim=hidden_dim // num_heads,  # timm multiplies it by the heads
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
    for index, block in enumerate(net.blocks):
        if index < local_layers:
            block.attn = GatedAttention(block.attn, num_tokens=side**2)  # type: ignore[arg-type]
        else:
            block.attn = _fused(block.attn, hidden_dim)  # type: ignore[arg-type]
    return Backbone(
        net,
        family="ConViT",
        block_names=[f"blocks.{index}" for index in range(depth)],
        layouts=[
            MapLayout("tokens", hidden_dim, int(index >= local_layers), (side, side))
            for index in range(depth)
        ],
    )


def _fused(source: MHSA, dim: int) -> Attention:
    """Return timm's plain attention, which can be fused, with the layers of ConViT's own."""
    attention = Attention(dim, num_heads=source.num_heads)
    for part in ("qkv", "attn_drop", "proj", "proj_drop"):
        setattr(attention, part, getattr(source, part))
    return attention
