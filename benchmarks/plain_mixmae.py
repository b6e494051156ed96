"""A step of MixMAE written the straightforward way: what step.py and attention.py measure ours against.

Scores are explicit tensors, the mask is built for every sample and window in every block, as the paper's method is
usually written down, and images are mixed as sums of masked pixels. Parameters have our names, so that our weights can
be loaded; with the same group map and partners the loss and the gradients are ours (tests/reference/test_plain.py).

Legend: B images (and mixes), K images per mix, C channels, H W a grid of tokens, w the side of a window, T = w*w tokens
of a window, nW windows, N heads, h w the grid of mask cells.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixmae.decoders import DecoderConfig
from mixmae.encoders.swin import SwinConfig
from mixmae.layers.positions import sin_cos_positions


def windows_of(x: Tensor, side: tuple[int, int]) -> Tensor:
    """(B, H, W, C) -> (B * nW, T, C)."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // side[0], side[0], width // side[1], side[1], channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, side[0] * side[1], channels)


class PlainAttention(nn.Module):
    """Attention in windows, or over the whole sequence without a bias if window is None."""

    def __init__(self, dim: int, num_heads: int, window: int | None) -> None:
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        if window is not None:
            self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))

    def bias(self, side: tuple[int, int]) -> Tensor:
        """(N, T, T)."""
        assert self.window is not None
        rows, columns = torch.meshgrid(torch.arange(side[0]), torch.arange(side[1]), indexing="ij")
        rows, columns = rows.flatten(), columns.flatten()
        down = rows[:, None] - rows[None] + self.window - 1
        right = columns[:, None] - columns[None] + self.window - 1
        index = (down * (2 * self.window - 1) + right).to(self.relative_position_bias_table.device)
        return self.relative_position_bias_table[index].permute(2, 0, 1)

    def attend(self, x: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
        """Args: x: (S, T, C).  bias: (N, T, T) or None.  mask: (S, T, T) bool, True = may not attend, or None."""
        length, dim = x.shape[1:]
        heads = self.qkv(x).reshape(-1, length, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        query, key, value = heads[0], heads[1], heads[2]
        scores = (query * (dim // self.num_heads) ** -0.5) @ key.transpose(-2, -1)  # (S, N, T, T)
        if bias is not None:
            scores = scores + bias
        if mask is not None:
            scores = scores.masked_fill(mask[:, None], float("-inf"))
        return self.proj((scores.softmax(dim=-1) @ value).transpose(1, 2).reshape(-1, length, dim))

    def forward(self, x: Tensor, groups: Tensor | None) -> Tensor:
        """Args: x: (B, H, W, C).  groups: (B, H, W), the image of each token of each sample, or None."""
        assert self.window is not None
        batch, height, width, dim = x.shape
        side = min(self.window, height), min(self.window, width)
        below, right = -height % side[0], -width % side[1]
        padded = F.pad(x, (0, 0, 0, right, 0, below))
        if groups is None:
            groups = torch.zeros(batch, height, width, dtype=torch.int64, device=x.device)
        own = windows_of(F.pad(groups, (0, right, 0, below), value=-1)[..., None], side)  # (B * nW, T, 1)
        read = self.attend(windows_of(padded, side), self.bias(side), own != own.transpose(1, 2))
        down, across = (height + below) // side[0], (width + right) // side[1]
        read = read.view(batch, down, across, *side, dim).permute(0, 1, 3, 2, 4, 5)
        return read.reshape(batch, height + below, width + right, dim)[:, :height, :width]


class PlainBlock(nn.Module):
    """Attention and an MLP, each after a norm and beside a shortcut."""

    def __init__(self, dim: int, num_heads: int, window: int | None, hidden_dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = PlainAttention(dim, num_heads, window)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden_dim), "fc2": nn.Linear(hidden_dim, dim)})

    def forward(self, x: Tensor, groups: Tensor | None = None) -> Tensor:
        normed = self.norm1(x)
        x = x + (self.attn.attend(normed, None, None) if self.attn.window is None else self.attn(normed, groups))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class PlainMerging(nn.Module):
    """2 x 2 tokens to one of twice the width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        quarters = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(quarters, dim=-1)))


class PlainStage(nn.Module):
    """Blocks at one resolution."""

    def __init__(self, config: SwinConfig, stage: int) -> None:
        super().__init__()
        dim, heads, window = config.channels[stage], config.num_heads[stage], config.window_sizes[stage]
        self.downsample = PlainMerging(dim // 2) if stage else nn.Identity()
        hidden = int(dim * config.mlp_ratio)
        self.blocks = nn.ModuleList(PlainBlock(dim, heads, window, hidden) for _ in range(config.depths[stage]))


class PlainPatches(nn.Module):
    """Pixels to tokens."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.embed_dim, config.patch_px, config.patch_px)
        self.norm = nn.LayerNorm(config.embed_dim)


class PlainSwin(nn.Module):
    """Swin without shifts."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        assert config.absolute_positions
        assert not config.shift
        self.config = config
        grid = (config.image_sides[0] // config.patch_px, config.image_sides[1] // config.patch_px)
        self.patch_embed = PlainPatches(config)
        self.register_buffer("pos_embed", sin_cos_positions(config.embed_dim, grid)[None])
        self.stages = nn.ModuleList(PlainStage(config, stage) for stage in range(len(config.depths)))
        self.norm = nn.LayerNorm(config.channels[-1])

    def forward(self, images: Tensor, group_map: Tensor | None) -> Tensor:
        """Args: images: (B, C, H, W).  group_map: (B, h, w) or None.   Returns: (B, L, C)."""
        x = self.patch_embed.norm(self.patch_embed.proj(images).permute(0, 2, 3, 1))
        x = x + self.pos_embed.view(1, *x.shape[1:])
        for stage in self.stages:
            x = stage.downsample(x)
            groups = None
            if group_map is not None:
                size = (x.shape[1], x.shape[2])
                groups = F.interpolate(group_map[:, None].float(), size, mode="nearest")[:, 0].long()
            for block in stage.blocks:
                x = block(x, groups)
        return self.norm(x).flatten(1, 2)


class PlainDecoder(nn.Module):
    """Tokens to pixels."""

    def __init__(self, encoder_dim: int, patch_px: int, grid: tuple[int, int], config: DecoderConfig) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_dim, config.dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.register_buffer("pos_embed", sin_cos_positions(config.dim, grid)[None])
        hidden = int(config.dim * config.mlp_ratio)
        self.blocks = nn.ModuleList(PlainBlock(config.dim, config.num_heads, None, hidden) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim)
        self.pred = nn.Linear(config.dim, 3 * patch_px**2)

    def forward(self, encoded: Tensor, shown: Tensor) -> Tensor:
        """Args: encoded: (B, L, E).  shown: (K, B, L) bool.   Returns: (K * B, L, P), one image of each mix first."""
        x = self.embed(encoded)
        sequences = [torch.where(one[..., None], x, self.mask_token.expand_as(x)) for one in shown]
        x = torch.cat(sequences) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.pred(self.norm(x))


class PlainMixMAE(nn.Module):
    """The pretraining model; its state dict has our names."""

    def __init__(self, encoder: SwinConfig, decoder: DecoderConfig, num_images: int) -> None:
        super().__init__()
        self.num_images, self.patch_px = num_images, encoder.strides[-1]
        self.grid = (encoder.image_sides[0] // self.patch_px, encoder.image_sides[1] // self.patch_px)
        self.encoder = PlainSwin(encoder)
        self.decoder = PlainDecoder(encoder.channels[-1], self.patch_px, self.grid, decoder)

    def forward(self, images: Tensor, group_map: Tensor, partners: Tensor) -> Tensor:
        """The loss.   Args: images: (B, 3, H, W).  group_map: (1, h, w).  partners: (B, K)."""
        groups = range(self.num_images)
        group_map = group_map.expand(len(images), -1, -1)
        pixels = F.interpolate(group_map[:, None].float(), images.shape[2:], mode="nearest")
        mixed = sum(images[partners[:, group]] * (pixels == group) for group in groups)
        shown = torch.stack([(group_map == group).flatten(1) for group in groups])  # (K, B, L)
        predicted = self.decoder(self.encoder(mixed, group_map), shown)
        targets = torch.cat([self.targets(images[partners[:, group]]) for group in groups])
        error = ((predicted - targets) ** 2).mean(dim=-1)
        hidden = (~shown).flatten(0, 1).to(error.dtype)
        return (error * hidden).sum() / hidden.sum()

    def targets(self, images: Tensor) -> Tensor:
        """Pixels of each patch with zero mean and unit std, (B, L, P)."""
        (rows, columns), side = self.grid, self.patch_px
        patches = images.reshape(len(images), 3, rows, side, columns, side)
        patches = torch.einsum("nchpwq->nhwpqc", patches).reshape(len(images), rows * columns, -1)
        mean, variance = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
        return (patches - mean) / (variance + 1e-6) ** 0.5
