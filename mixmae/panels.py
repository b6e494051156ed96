"""Pictures for people: what the model sees, hides and fills in.

Legend: N images, M mixes, K images per mix, h w cells, C channels, H W pixels.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GROUP_COLORS = ((230, 60, 60), (50, 120, 230), (40, 170, 80), (240, 160, 20), (150, 80, 200))
"""Outline of the cells of group 0, 1, ...: at most five images are mixed."""
GAP_PX = 6
TITLE_PX = 16


def reconstruction_panel(
    pictures: Mapping[str, Tensor], *, mean: Sequence[float], std: Sequence[float], scale: int = 1, caption: str = ""
) -> Image.Image:
    """Draw one row per mix: the K originals, the mix, the K reconstructions, with each group's cells in its colour.

    A masked image (MAE, SimMIM) is a mix of one image, whose hidden cells belong to no image and have no outline.
    A reconstruction shows the prediction in hidden cells, and the original in the cells that the model saw, where its
    output is not trained.

    Args:
        pictures: of StepOutput: originals (N, C, H, W), mixed (M, C, H, W), reconstructions (M, K, C, H, W), all
            normalised; group_map (M or 1, h, w) int64; partners (M, K) int64 in [0, N), the image of each group.
        mean, std: of the pixel normalisation, in units of 0..1; one value per channel.
        scale: pixels of the panel per pixel of the image, along a side.
        caption: text below the panel.
    Returns: an RGB picture. Of images with other than three channels it shows the first three, or the first one.
    """
    originals, mixed = pictures["originals"], pictures["mixed"]
    reconstructions, partners = pictures["reconstructions"], pictures["partners"]
    num_mixes, num_images = partners.shape
    group_map = pictures["group_map"].expand(num_mixes, -1, -1)
    height, width = originals.shape[-2] * scale, originals.shape[-1] * scale
    columns = 2 * num_images + 1
    panel_width = columns * (width + GAP_PX) + GAP_PX
    font = ImageFont.load_default(size=11)
    lines = textwrap.wrap(caption, max(1, int((panel_width - 2 * GAP_PX) / font.getlength("n")))) if caption else []
    pictures_height = TITLE_PX + num_mixes * (height + GAP_PX)
    panel = Image.new("RGB", (panel_width, pictures_height + TITLE_PX * len(lines)), (255, 255, 255))
    draw = ImageDraw.Draw(panel)
    if num_images == 1:
        titles = ["image", "seen by the model", "reconstruction"]
    else:
        images, filled_in = ([f"{name} {k + 1}" for k in range(num_images)] for name in ("image", "reconstruction"))
        titles = [*images, "mix", *filled_in]
    for column, title in enumerate(titles):
        draw.text((GAP_PX + column * (width + GAP_PX), 2), title, fill=(0, 0, 0), font=font)
    for m in range(num_mixes):
        shown_pixels = _to_pixels(group_map[m], originals.shape[-2:])
        filled = [
            torch.where(shown_pixels == k, originals[partners[m, k]], reconstructions[m, k]) for k in range(num_images)
        ]
        tiles = [*originals[partners[m]], mixed[m], *filled]
        shown = [*range(num_images), None if num_images > 1 else 0, *range(num_images)]
        for column, (tile, group) in enumerate(zip(tiles, shown, strict=True)):
            left, top = GAP_PX + column * (width + GAP_PX), TITLE_PX + m * (height + GAP_PX)
            picture = to_image(tile, mean=mean, std=std).resize((width, height), Image.Resampling.NEAREST)
            panel.paste(picture, (left, top))
            _outline_cells(draw, group_map[m].cpu().numpy(), (left, top, width, height), only=group)
    for number, line in enumerate(lines):
        draw.text((GAP_PX, pictures_height + number * TITLE_PX), line, fill=(0, 0, 0), font=font)
    return panel


def _to_pixels(cells: Tensor, size: Sequence[int]) -> Tensor:
    """Repeat (h, w) cells to (H, W) pixels."""
    rows, columns = size[0] // cells.shape[0], size[1] // cells.shape[1]
    return cells.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def to_image(pixels: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """Turn normalised pixels (C, H, W) float into an RGB picture, clipped to 0..255."""
    offset = torch.as_tensor(mean, dtype=torch.float32)[:, None, None]
    scale = torch.as_tensor(std, dtype=torch.float32)[:, None, None]
    unit = pixels.detach().float().cpu() * scale + offset
    unit = unit[:3] if unit.shape[0] >= 3 else unit[:1].expand(3, -1, -1)
    return Image.fromarray((unit.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def _outline_cells(
    draw: ImageDraw.ImageDraw, cells: np.ndarray, box: tuple[int, int, int, int], *, only: int | None
) -> None:
    """Outline the cells of group `only` (None: of every group) in their group's colour."""
    left, top, width, height = box
    rows, columns = cells.shape
    for row in range(rows):
        for column in range(columns):
            group = int(cells[row, column])
            if only is not None and group != only:
                continue
            x0, y0 = left + column * width // columns, top + row * height // rows
            x1, y1 = left + (column + 1) * width // columns - 1, top + (row + 1) * height // rows - 1
            draw.rectangle((x0, y0, x1, y1), outline=GROUP_COLORS[group % len(GROUP_COLORS)])
