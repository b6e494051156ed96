"""Pictures for people: what the model sees, hides and fills in.

Legend: N images, M mixes, K images per mix, h w cells, C channels, H W pixels.
"""

from __future__ import annotations

import colorsys
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GROUP_COLORS = ((230, 60, 60), (50, 120, 230), (40, 170, 80), (240, 160, 20), (150, 80, 200))
"""Outline of the cells of group 0, 1, ...: at most five images are mixed."""
TILE_PX = 200
"""Images are enlarged by the whole factor that brings their width next to it: four columns are 700 to 1,100 px wide."""
GAP_PX = 6
TITLE_PX = 16
WHITE = (255, 255, 255)
_GOLDEN = (5**0.5 - 1) / 2
CAPTION = "Outlined cells were shown to the model; the others are its prediction."
NORMALISED_CAPTION = (
    "Outlined cells were shown to the model. Hidden cells take brightness and contrast from the visible ones around "
    "them: what the reconstruction has beyond a prediction of zero, the model has found."
)


def reconstruction_panel(pictures: Mapping[str, Tensor], *, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """Draw one row per image: the original, what the model saw of it, the reconstruction.

    Before the reconstruction stands, for normalised targets, a prediction of zero: what the reconstruction has beyond
    it, the model has found. Both show the original in the cells that the model saw, which are outlined: its output is
    not trained there. Images of one mix stand together, each with the mix and its own cells outlined in its colour. A
    masked image (MAE, SimMIM) is a mix of one image, whose hidden cells belong to no image.

    Args:
        pictures: of StepOutput: originals (N, C, H, W), mixed (M, C, H, W), reconstructions and perhaps
            zero_predictions (M, K, C, H, W), all normalised; group_map (M or 1, h, w) int64; partners (M, K) int64 in
            [0, N), the image of each group.
        mean, std: of the pixel normalisation, in units of 0..1; one value per channel.
    Returns: an RGB picture with a caption. Of images with other than three channels it shows the first three, or the
        first one.
    """
    originals, mixed, partners = pictures["originals"], pictures["mixed"], pictures["partners"]
    num_mixes, num_images = partners.shape
    group_map = pictures["group_map"].expand(num_mixes, -1, -1)
    titles = {"zero_predictions": "prediction of zero", "reconstructions": "reconstruction"}
    titles = {name: title for name, title in titles.items() if name in pictures}
    scale = max(1, round(TILE_PX / originals.shape[-1]))
    height, width = originals.shape[-2] * scale, originals.shape[-1] * scale
    mix_height = num_images * (height + GAP_PX) + 2 * GAP_PX * (num_images > 1)

    panel_width = (2 + len(titles)) * (width + GAP_PX) + GAP_PX
    font = ImageFont.load_default(size=11)
    caption = NORMALISED_CAPTION if len(titles) > 1 else CAPTION
    lines = textwrap.wrap(caption, max(1, int((panel_width - 2 * GAP_PX) / font.getlength("n"))))
    pictures_height = TITLE_PX + num_mixes * mix_height
    panel = Image.new("RGB", (panel_width, pictures_height + TITLE_PX * len(lines)), (255, 255, 255))
    draw = ImageDraw.Draw(panel)
    for column, title in enumerate(["image", "mix" if num_images > 1 else "seen by the model", *titles.values()]):
        draw.text((GAP_PX + column * (width + GAP_PX), 2), title, fill=(0, 0, 0), font=font)
    for m in range(num_mixes):
        cells = group_map[m].cpu().numpy()
        shown_pixels = _to_pixels(group_map[m], originals.shape[-2:])
        for k in range(num_images):
            original = originals[partners[m, k]]
            predictions = [torch.where(shown_pixels == k, original, pictures[name][m, k]) for name in titles]
            top = TITLE_PX + m * mix_height + k * (height + GAP_PX)
            for column, tile in enumerate([original, mixed[m], *predictions]):
                left = GAP_PX + column * (width + GAP_PX)
                picture = to_image(tile, mean=mean, std=std).resize((width, height), Image.Resampling.NEAREST)
                panel.paste(picture, (left, top))
                if column:
                    _outline_cells(draw, cells == k, (left, top, width, height), GROUP_COLORS[k % len(GROUP_COLORS)])
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
    draw: ImageDraw.ImageDraw, cells: np.ndarray, box: tuple[int, int, int, int], color: tuple[int, int, int]
) -> None:
    """Outline the areas of cells that are True."""
    left, top, width, height = box
    rows, columns = cells.shape
    around = np.pad(cells, 1)
    for row, column in np.argwhere(cells):
        x0, y0 = left + column * width // columns, top + row * height // rows
        x1, y1 = left + (column + 1) * width // columns - 1, top + (row + 1) * height // rows - 1
        sides = {(0, 1): (x0, y0, x1, y0), (2, 1): (x0, y1, x1, y1), (1, 0): (x0, y0, x0, y1), (1, 2): (x1, y0, x1, y1)}
        for (down, right), side in sides.items():
            if not around[row + down, column + right]:
                draw.line(side, fill=color)


def page_of(tiles: Sequence[Image.Image], *, columns: int) -> Image.Image:
    """Pictures of one width in lines, on one page.   Args: tiles: at least one.  columns: in a line."""
    lines = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in line) for line in lines]
    width = tiles[0].width
    page = Image.new("RGB", (columns * width, sum(heights)), (32, 32, 32))
    for number, line in enumerate(lines):
        for column, tile in enumerate(line):
            page.paste(tile, (column * width, sum(heights[:number])))
    return page


def palette(class_names: Sequence[str]) -> NDArray[np.uint8]:
    """A colour for each class, the same in all pictures of a set; neighbours in the list are easily told apart.

    Returns: (256, 3) uint8; classes without a name are white.
    """
    colours = np.full((256, 3), WHITE, dtype=np.uint8)
    for index in range(len(class_names)):
        hue = (0.08 + _GOLDEN * index) % 1  # no two of the first dozens are near each other
        rgb = colorsys.hsv_to_rgb(hue, (0.35, 0.9, 0.6, 0.95)[index % 4], (0.5, 0.9, 1.0, 0.65)[index % 4])
        colours[index] = np.round(255 * np.array(rgb))
    return colours
