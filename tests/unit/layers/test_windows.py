"""Window attention against a plain loop over tokens, and the size of what is added to the scores."""

import pytest
import torch
from torch.nn import functional as F

from mixmae.layers import attention as attention_module
from mixmae.layers.attention import attend
from mixmae.layers.positions import relative_position_bias
from mixmae.layers.windows import WindowAttention, plan_sorted, plan_windows
from mixmae.mixing import draw_group_map, group_sizes, upsample_group_map
from tests.factories import seeded

DIM, HEADS, BATCH = 8, 2, 3


def attend_by_hand(attention, x, window, group_map, shifted=False):
    """Let each token read, one at a time, the tokens of its window and its group.

    A shifted window starts half a window further, so the first ones are cut off by the upper and the left border.
    """
    batch, height, width, dim = x.shape
    rows, columns = min(window, height), min(window, width)
    down = rows // 2 if shifted and height > rows else 0
    right = columns // 2 if shifted and width > columns else 0
    bias = relative_position_bias(attention.relative_position_bias_table, (rows, columns))
    head_dim = dim // attention.num_heads
    query, key, value = attention.qkv(x).view(batch, height, width, 3, attention.num_heads, head_dim).unbind(3)
    read = torch.zeros(batch, height, width, attention.num_heads, head_dim)
    for b in range(batch):
        groups = torch.zeros(height, width) if group_map is None else group_map[b % len(group_map)]
        for i in range(height):
            for j in range(width):
                top, left = (i - down) // rows * rows + down, (j - right) // columns * columns + right
                near = [
                    (k, m)
                    for k in range(max(top, 0), min(top + rows, height))
                    for m in range(max(left, 0), min(left + columns, width))
                    if groups[k, m] == groups[i, j]
                ]
                own = (i - top) * columns + j - left
                others = [(k - top) * columns + m - left for k, m in near]
                keys = torch.stack([key[b, k, m] for k, m in near])  # (n, heads, head_dim)
                values = torch.stack([value[b, k, m] for k, m in near])
                scores = (keys * query[b, i, j]).sum(-1) / head_dim**0.5 + bias[:, own, others].T
                read[b, i, j] = (scores.softmax(0)[..., None] * values).sum(0)
    return attention.proj(read.flatten(3))


@pytest.mark.parametrize("shifted", [False, True], ids=["plain", "shifted"])
@pytest.mark.parametrize("num_maps", [0, 1, BATCH])
@pytest.mark.parametrize(
    ("size", "window"),
    [((4, 6), 2), ((3, 3), 3), ((5, 7), 3), ((2, 5), 4), ((9, 6), 4)],
    ids=["divides", "one-window", "padded", "clamped-and-padded", "padded-by-most-of-a-window"],
)
def test_attention_is_that_of_a_plain_loop(size, window, num_maps, shifted):
    torch.manual_seed(0)
    attention = WindowAttention(DIM, HEADS, window)
    torch.nn.init.normal_(attention.relative_position_bias_table)
    x = torch.randn(BATCH, *size, DIM)
    group_map = torch.randint(0, 3, (num_maps, *size)) if num_maps else None
    plan = plan_windows(size, window, group_map, shifted=shifted)
    torch.testing.assert_close(
        attention(x, plan), attend_by_hand(attention, x, window, group_map, shifted), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("num_maps", [0, 1, BATCH])
def test_without_a_learned_bias_it_is_attention_with_a_bias_of_zero(num_maps):
    torch.manual_seed(0)
    plain, biased = WindowAttention(DIM, HEADS, None), WindowAttention(DIM, HEADS, 3)
    assert "relative_position_bias_table" not in dict(plain.named_parameters())
    plain.load_state_dict(biased.state_dict(), strict=False)
    torch.nn.init.zeros_(biased.relative_position_bias_table)
    x = torch.randn(BATCH, 5, 6, DIM)
    for size in ((5, 6), (3, 6)):  # padded or not
        group_map = torch.randint(0, 3, (num_maps, *size)) if num_maps else None
        plan, part = plan_windows(size, 3, group_map), x[:, : size[0]]
        torch.testing.assert_close(plain(part, plan), biased(part, plan), rtol=1e-5, atol=1e-6)


def test_padding_changes_nothing_without_a_group_map():
    """What stands in the padding is never read: not even its gradient exists."""
    plan = plan_windows((5, 7), 3, None)
    assert plan.padding == (1, 2)
    assert plan.attn_mask is not None
    assert plan_windows((6, 9), 3, None).attn_mask is None


@pytest.mark.parametrize(
    ("num_maps", "expected"), [(0, (1, HEADS, 9, 9)), (1, (1, 4 * HEADS, 9, 9)), (BATCH, (BATCH, 4 * HEADS, 9, 9))]
)
def test_a_shared_map_adds_nothing_of_the_size_of_the_scores(monkeypatch, num_maps, expected):
    seen = []

    def record(query, key, value, bias):
        seen.append(tuple(bias.shape))
        return attend(query, key, value, bias)

    monkeypatch.setattr("mixmae.layers.windows.attend", record)
    group_map = torch.zeros(num_maps, 6, 6, dtype=torch.int64) if num_maps else None
    WindowAttention(DIM, HEADS, 3)(torch.randn(BATCH, 6, 6, DIM), plan_windows((6, 6), 3, group_map))
    assert seen == [expected]


def test_map_of_another_size():
    with pytest.raises(ValueError, match="does not fit a grid of 4 x 4"):
        plan_windows((4, 4), 2, torch.zeros(1, 2, 2, dtype=torch.int64))


SORTED = [
    ((7, 7), (7, 7), 4, 7, 0.0),  # 13, 12, 12 and 12 tokens
    ((7, 7), (14, 14), 4, 14, 0.0),
    ((7, 7), (14, 14), 2, 16, 0.0),  # a window larger than the grid
    ((4, 4), (8, 8), 4, 8, 0.0),  # groups of one size
    ((4, 4), (8, 8), 2, 8, 0.5),  # beside them a group of mask tokens, the largest
    ((2, 5), (4, 10), 3, 10, 0.0),
]
CUT = [
    ((7, 7), (14, 14), 4, 7, 0.0),  # windows along cells
    ((7, 7), (14, 14), 4, 5, 0.0),  # across cells, and padded
    ((4, 4), (8, 12), 3, 6, 0.0),
]


@pytest.mark.parametrize(
    ("cells", "size", "num_images", "window", "filled", "num_maps"),
    [(*case, num_maps) for case in SORTED for num_maps in (1, BATCH)] + [(*case, 1) for case in CUT],
)
def test_sorted_by_group_it_is_masked_attention(monkeypatch, cells, size, num_images, window, filled, num_maps):
    """Outputs and all gradients, in float64."""
    torch.manual_seed(0)
    attention = WindowAttention(DIM, HEADS, window).double()
    torch.nn.init.normal_(attention.relative_position_bias_table)
    cell_map = draw_group_map(cells, num_images, seeded(), num_maps, filled)
    groups, per_cell = upsample_group_map(cell_map, size), size[0] * size[1] // (cells[0] * cells[1])
    plan = plan_sorted(groups, [count * per_cell for count in group_sizes(cell_map)], window)
    assert plan is not None
    x = torch.randn(BATCH, *size, DIM, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)

    def run(work):
        read = work()
        gradients = torch.autograd.grad((read * weight).sum(), [x, *attention.parameters()])
        return [read.detach(), *gradients]

    scores = []

    def record(query, key, value, bias):
        scores.append(query.shape[1] * query.shape[2] * key.shape[2])
        return attend(query, key, value, bias)

    expected = run(lambda: attention(x, plan_windows(size, window, groups)))
    monkeypatch.setattr("mixmae.layers.windows.attend", record)
    found = run(lambda: plan.unsort(attention(plan.sort(x), plan)))
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12)
    places = torch.cartesian_prod(*(torch.arange(side) // window for side in size))
    own = torch.cat([places, groups[0].view(-1, 1)], dim=1)  # window and group of each token
    assert sum(scores) == HEADS * int((own[:, None] == own).all(dim=2).sum())  # no other pair


def test_what_is_not_sorted():
    cell_map = draw_group_map((6, 6), 4, seeded())
    sizes = group_sizes(cell_map)
    assert plan_sorted(cell_map, sizes, 6) is not None
    assert plan_sorted(cell_map.to("meta"), sizes, 5) is None  # several windows, on anything but a CPU
    assert plan_sorted(draw_group_map((6, 6), 4, seeded(), 3), sizes, 5) is None  # several windows of several maps
    assert plan_sorted(cell_map, (), 6) is None  # maps with groups of different sizes
    assert plan_sorted(draw_group_map((5, 5), 4, seeded()), (7, 6, 6, 6), 5) is None  # hardly any tokens


@pytest.mark.parametrize(("side", "num_images", "pays"), [(14, 4, True), (14, 2, True), (8, 4, False), (7, 4, False)])
def test_a_gpu_sorts_where_its_tiles_become_fewer_and_reads_biases_in_one_piece(monkeypatch, side, num_images, pays):
    """Rows of a bias that are not in one piece send torch to the kernel that keeps all scores."""
    biases, honest = [], F.scaled_dot_product_attention

    def fused(query, key, value, attn_mask):
        biases.append(attn_mask)
        return honest(query, key, value, attn_mask=attn_mask)

    monkeypatch.setattr(attention_module, "on_cpu", lambda tensor: False)
    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    cells = draw_group_map((side, side), num_images, seeded())
    plan = plan_sorted(cells, group_sizes(cells), side)
    assert (plan is not None) == pays
    if plan is not None:
        WindowAttention(8, 2, side)(torch.randn(2, side, side, 8), plan)
        assert len(biases) == num_images
        assert all(bias.is_contiguous() for bias in biases)
