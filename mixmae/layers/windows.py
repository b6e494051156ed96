"""Attention inside windows, restricted to the tokens of one's own group (paper section 3.3, masked self-attention).

Tokens are sorted by window and group once for all blocks of a stage, where the host knows the sizes of the groups:
everything else in a block is per token, so each group of a window is then a dense block of its own, and no score of two
groups is ever computed.

Legend: B samples, M group maps (B or 1), H W a grid of tokens, L = H*W, C channels, N heads, nW windows, T tokens in a
window, D = C / N. The plan (sizes, and which pairs may attend) is shared by all blocks of a stage; with shifted windows
there are two plans, for even and odd blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixmae.layers import attention
from mixmae.layers.attention import attend
from mixmae.layers.initialisation import TABLE_STD
from mixmae.layers.positions import relative_position_bias
from mixmae.mixing import group_sizes

PADDING_GROUP = -1
"""The group of tokens that pad a grid to whole windows: no image has it, so no image attends to them."""


@dataclass(frozen=True, kw_only=True)
class WindowPlan:
    """How a grid of tokens is cut into windows, and which pairs of tokens may attend."""

    size: tuple[int, int]
    """(H, W) of the grid without padding."""
    window: tuple[int, int]
    """(rows, columns) of a window."""
    num_windows: tuple[int, int]
    """Windows down and across; they cover the grid, padding included."""
    shift: tuple[int, int] = (0, 0)
    """Rows and columns that the padded grid is rolled by, up and to the left, before it is cut."""
    attn_mask: Tensor | None
    """(M, nW, 1, T, T) bool, True where the row's token may attend to the column's; None if all pairs may."""

    @property
    def padding(self) -> tuple[int, int]:
        """Rows and columns that are added below and to the right."""
        return tuple(n * w - s for n, w, s in zip(self.num_windows, self.window, self.size, strict=True))  # type: ignore[return-value]


def plan_windows(
    size: tuple[int, int],
    window: int,
    groups: Tensor | None,
    device: torch.device | None = None,
    *,
    shifted: bool = False,
) -> WindowPlan:
    """Cut a grid into windows and find the pairs of tokens that belong to one group.

    A window is never larger than the grid: each side clamps to the grid's. A grid that is no multiple of the window is
    padded, and padding is a group of its own, also where there are no groups.

    Shifted windows start half a window further down and right, on each side that has more than one window. The padded
    grid is rolled: rows that leave at the top come back at the bottom, in one window with rows of the other end, and
    the two are kept apart like groups.

    Args:
        size: (H, W) of the grid.
        window: configured side of a window.
        groups: (M, H, W) int64, the group of each token, M = 1 where all samples share it; None = no groups.
        device: of the plan's tensor where there are no groups to follow; default torch's.
        shifted: shift the windows.
    Returns: the plan.
    Raises: ValueError if groups has another size than the grid.
    Source: Swin, for the shift. timm rolls before it pads, which parts neighbours of a grid that needs padding.
    """
    height, width = size
    rows, columns = min(window, height), min(window, width)
    down, across = -(-height // rows), -(-width // columns)
    below, right = down * rows - height, across * columns - width
    shift = (rows // 2 if down > 1 else 0, columns // 2 if across > 1 else 0) if shifted else (0, 0)
    attn_mask = None
    if groups is None and (below or right or any(shift)):
        groups = torch.zeros(1, height, width, dtype=torch.int64, device=device)
    if groups is not None:
        if groups.shape[1:] != size:
            raise ValueError(f"a group map of shape {tuple(groups.shape)} does not fit a grid of {height} x {width}")
        padded = F.pad(groups, (0, right, 0, below), value=PADDING_GROUP)
        if any(shift):
            # Each group (padding too) splits into up to four: rows and columns that come back are kept apart.
            wraps_down = torch.arange(down * rows, device=padded.device) < shift[0]
            wraps_right = torch.arange(across * columns, device=padded.device) < shift[1]
            padded = (4 * padded + 2 * wraps_down[:, None] + wraps_right).roll((-shift[0], -shift[1]), dims=(1, 2))
        windows = padded.view(-1, down, rows, across, columns).transpose(2, 3)
        own = windows.reshape(-1, down * across, 1, rows * columns)  # (M, nW, 1, T)
        attn_mask = own[..., :, None] == own[..., None, :]
    return WindowPlan(size=size, window=(rows, columns), num_windows=(down, across), shift=shift, attn_mask=attn_mask)


MIN_SORTED_TOKENS = 32
"""Tokens of a grid from which on sorting pays on a CPU: in smaller ones masked scores cost less than more and smaller
calls."""
TILE = 64
"""Queries and keys that a GPU's kernels compute at once: a group of 13 tokens costs them as much as one of 64."""


@dataclass(frozen=True, kw_only=True)
class SortedPlan:
    """A grid with its tokens in the order of their groups, where each window has its own: large groups first."""

    order: Tensor
    """(M, L) int64: the token, in row order, that comes to each place."""
    places: Tensor
    """(M, L) int64: the place of each token; the inverse."""
    runs: tuple[tuple[int, int], ...]
    """The groups one after another as (groups, tokens of each): groups of one size that are computed together."""
    offsets: Tensor
    """(M, pairs) int64: row of the table of offsets for each pair of tokens of one group, the query's index first."""

    def sort(self, x: Tensor) -> Tensor:
        """Move the tokens of (B, H, W, C) to their places; the shape stays."""
        return _rearranged(x, self.order)

    def unsort(self, x: Tensor) -> Tensor:
        """Undo sort."""
        return _rearranged(x, self.places)


def _rearranged(x: Tensor, order: Tensor) -> Tensor:
    flat = x.flatten(1, 2)  # (B, L, C)
    if len(order) == 1:
        return flat.index_select(1, order[0]).view(x.shape)
    return flat.take_along_dim(order[..., None], dim=1).view(x.shape)


def plan_sorted(
    groups: Tensor, sizes: Sequence[int], window: int, *, together: bool | None = None
) -> SortedPlan | None:
    """Sort the tokens of a grid by group, where that is possible and pays.

    On a CPU it pays for all but very small grids. A GPU's kernels compute tiles of TILE x TILE scores, so that there it
    pays where the groups need fewer tiles than the grid (docs/benchmarks/step_h200_202611.md).

    Where the grid is cut into several windows, sizes differ from draw to draw: a GPU would wait for them, and a graph
    would be compiled anew. So only a CPU sorts there, and not in a graph.

    Args:
        groups: (M, H, W) int64 in [0, len(sizes)).
        sizes: tokens of the groups of every map, the largest first, 0 for groups that no token is in; empty if the maps
            differ. They are given, because the host of a GPU would have to wait for them.
        window: configured side of a window; windows are not shifted.
        together: compute groups of one size in one call, for which queries, keys and values are copied; default on a
            CPU. Elsewhere calls cost less than copies.
    Returns: the plan; None where windows are to be masked.
    """
    height, width = groups.shape[1:]
    if not sizes or not _sorting_pays(height * width, sizes, attention.on_cpu(groups)):
        return None
    if window < max(height, width):
        if not attention.on_cpu(groups) or torch.compiler.is_compiling():
            return None
        down, right = torch.arange(height)[:, None] // window, torch.arange(width) // window
        groups = (down * width + right) * len(sizes) + groups  # each window has groups of its own
        groups = groups.view(-1).unique(return_inverse=True)[1].view(groups.shape)
        sizes = group_sizes(groups)
        if not sizes:
            return None
    flat = groups.flatten(1)  # (M, L)
    counts = torch.zeros(len(flat), len(sizes), dtype=torch.int64, device=groups.device)
    counts.scatter_add_(1, flat, torch.ones_like(flat))
    rank = counts.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # (M, groups): 0 for the largest
    order = rank.gather(1, flat).argsort(dim=1, stable=True)
    together = attention.on_cpu(groups) if together is None else together
    runs: list[tuple[int, int]] = []
    for tokens in filter(None, sizes):
        if runs and together and runs[-1][1] == tokens:
            runs[-1] = (runs[-1][0] + 1, tokens)
        else:
            runs.append((1, tokens))
    rows, columns = order // width, order % width
    offsets = [
        (_differences(down, window) * (2 * window - 1) + _differences(right, window)).flatten(1)
        for down, right in zip(_by_group(rows, runs), _by_group(columns, runs), strict=True)
    ]
    return SortedPlan(order=order, places=order.argsort(dim=1), runs=tuple(runs), offsets=torch.cat(offsets, dim=1))


def _sorting_pays(tokens: int, sizes: Sequence[int], on_cpu: bool) -> bool:
    """Whether scores of each group alone cost less than those of a whole grid, masked.

    Args: tokens: of the grid.  sizes: tokens of each group.
    """
    if on_cpu:
        return tokens >= MIN_SORTED_TOKENS
    return sum((-(-size // TILE)) ** 2 for size in sizes) < (-(-tokens // TILE)) ** 2


def _by_group(places: Tensor, runs: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Cut (M, L) into one (M, groups, tokens) for each run."""
    parts = places.split([groups * tokens for groups, tokens in runs], dim=1)
    return [part.unflatten(1, run) for part, run in zip(parts, runs, strict=True)]


def _differences(places: Tensor, window: int) -> Tensor:
    """(M, groups, T) -> (M, groups, T, T): the query's place minus the key's, from 0 on."""
    return places[..., :, None] - places[..., None, :] + (window - 1)


class WindowAttention(nn.Module):
    """Multi-head attention inside each window of a plan, with a learned bias per offset and head.

    Args:
        dim: C.
        num_heads: N, a divisor of dim.
        window: configured side w of a window; the table of offsets has (2w - 1)**2 rows. None = no bias, any window.
    Source: paper sections 3.2 and 3.3; Swin. Group isolation is exact: a pair that may not attend gets a score of minus
        infinity, hence a weight and a gradient of exactly zero.
    """

    def __init__(self, dim: int, num_heads: int, window: int | None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table: nn.Parameter | None = None
        if window is not None:
            self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, num_heads))
            nn.init.trunc_normal_(self.relative_position_bias_table, std=TABLE_STD)

    def forward(self, x: Tensor, plan: WindowPlan | SortedPlan) -> Tensor:
        """Let each token attend to the tokens of its window.

        Args:
            x: (B, H, W, C), sorted if the plan is.
            plan: the plan of this stage; the sides of its size are H and W, its M is B or 1.
        Returns: (B, H, W, C), sorted if the plan is.
        """
        if isinstance(plan, SortedPlan):
            return self._attend_in_groups(x, plan)
        batch, height, width, dim = x.shape
        (rows, columns), (down, across), (below, right) = plan.window, plan.num_windows, plan.padding
        head_dim = dim // self.num_heads
        qkv = self.qkv(x)
        if below or right:
            qkv = F.pad(qkv, (0, 0, 0, right, 0, below))
        if any(plan.shift):
            qkv = qkv.roll((-plan.shift[0], -plan.shift[1]), dims=(1, 2))
        qkv = qkv.view(batch, down, rows, across, columns, 3, self.num_heads, head_dim)
        # Windows count as samples; where each window has a mask of its own that the samples share, they count as heads.
        lead = batch * down * across if plan.attn_mask is None else batch
        # One copy from the linear layer to windows and heads; none where one window is the whole grid.
        qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, lead, -1, rows * columns, head_dim)
        query, key, value = qkv.unbind(0)  # each (B, nW * N, T, D) or (B * nW, N, T, D)
        read = attend(query, key, value, self.head_mask(plan, query.dtype))
        read = read.view(batch, down, across, self.num_heads, rows, columns, head_dim)
        read = read.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, down * rows, across * columns, dim)
        if any(plan.shift):
            read = read.roll(plan.shift, dims=(1, 2))
        return self.proj(read[:, :height, :width])

    def _attend_in_groups(self, x: Tensor, plan: SortedPlan) -> Tensor:
        """Let each token attend to the tokens of its group, in dense blocks; arguments as of forward."""
        assert self.relative_position_bias_table is not None
        batch, length, heads = len(x), x.shape[1] * x.shape[2], self.num_heads
        qkv = self.qkv(x).view(batch, length, 3, heads, -1)
        # As an embedding: its gradient is summed in a fixed order on a GPU, too.
        bias = F.embedding(plan.offsets, self.relative_position_bias_table).to(qkv.dtype)  # (M, pairs, N)
        reads = []
        for (groups, tokens), part, pairs in zip(
            plan.runs,
            qkv.split([groups * tokens for groups, tokens in plan.runs], dim=1),
            bias.split([groups * tokens**2 for groups, tokens in plan.runs], dim=1),
            strict=True,
        ):
            part = part.unflatten(1, (groups, tokens)).permute(3, 0, 1, 4, 2, 5).flatten(2, 3)
            # A GPU's kernels want a bias in one piece: without, torch falls back to what keeps all scores.
            pairs = pairs.unflatten(1, (groups, tokens, tokens)).permute(0, 1, 4, 2, 3).flatten(1, 2).contiguous()
            query, key, value = part.unbind(0)
            read = attend(query, key, value, pairs)  # (B, groups * N, tokens, D), with a bias (M, groups * N, ...)
            reads.append(read.unflatten(1, (groups, heads)).transpose(2, 3).reshape(batch, groups * tokens, -1))
        read = reads[0] if len(reads) == 1 else torch.cat(reads, dim=1)
        return self.proj(read.view(x.shape))

    def head_mask(self, plan: WindowPlan, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """Build the mask of a plan for all heads, with the learned bias where there is one.

        A map that the batch shares gives one mask, which broadcasts over the samples; only a map per sample makes the
        mask as large as the scores.

        Args: dtype: of the queries.
        Returns: what torch's attention takes as attn_mask. With a learned bias of dtype, added to the scores: (1, N, T,
            T) where all pairs may attend, else (M, nW * N, T, T) with minus infinity where they may not. Without one
            bool, True = may attend, of the same shape, or None where all may.
        """
        if self.relative_position_bias_table is None:
            if plan.attn_mask is None:
                return None
            return plan.attn_mask.expand(-1, -1, self.num_heads, -1, -1).flatten(1, 2)
        # The small table is converted, not the large mask.
        learned = relative_position_bias(self.relative_position_bias_table, plan.window).to(dtype)  # (N, T, T)
        if plan.attn_mask is None:
            return learned[None]
        return torch.where(plan.attn_mask, learned, float("-inf")).flatten(1, 2)
