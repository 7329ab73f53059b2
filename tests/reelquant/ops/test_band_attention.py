"""Band attention against a mask over the whole map, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from reelquant.attention.head_kind import row_masks, sampled_rows
from reelquant.ops.band_attention.op import Correction, band_attention, dense_and_band_attention, dense_attention
from reelquant.ops.band_attention.reference import band_attention_reference
from reelquant.ops.token_order import place_major_order, place_major_positions
from reelquant.tokens import TokenLayout, band_width, mask_density, visited_pairs
from tests.errors import raises

LAYOUTS = [TokenLayout(3, 5, 7, 4), TokenLayout(8, 10, 12, 11), TokenLayout(1, 3, 3, 0), TokenLayout(5, 1, 1, 2)]


def whole_mask(layout: TokenLayout, width: int, kind: str) -> Tensor:
    """`[L, L]` bool, from the definition: every token's place in its head's order."""
    tokens, num_frames = [], layout.num_frames - layout.dense_frames
    for frame in range(num_frames):
        for place in range(layout.height * layout.width):
            frame_major = frame * layout.height * layout.width + place
            tokens.append(frame_major if kind == "s" else place * num_frames + frame)
    places, banded = torch.tensor(tokens), slice(layout.num_video - len(tokens), layout.num_video)
    mask = torch.ones(layout.num_tokens, layout.num_tokens, dtype=torch.bool)
    mask[banded, banded] = (places[:, None] - places[None, :]).abs() < width
    return mask


def brute_force(q: Tensor, k: Tensor, v: Tensor, *, kinds: str, layout: TokenLayout, width: int) -> Tensor:
    scores = q @ k.transpose(1, 2) / q.shape[2] ** 0.5
    masks = torch.stack([whole_mask(layout, width, kind) for kind in kinds]).to(q.device)
    out: Tensor = scores.masked_fill(~masks, float("-inf")).softmax(2) @ v
    return out


def qkv(layout: TokenLayout, heads: int, head_dim: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (2 * torch.randn(heads, layout.num_tokens, head_dim, generator=generator).double() for _ in range(3))
    return q, k, v


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kinds", ["s", "t", "stt", "tss"])
def test_is_attention_under_the_mask(layout: TokenLayout, kinds: str) -> None:
    q, k, v = qkv(layout, len(kinds), 12)
    for width in {1, 2, 7, layout.num_video // 2 + 1, layout.num_video, layout.num_video + 5}:
        expected = brute_force(q, k, v, kinds=kinds, layout=layout, width=width)
        for rows in (3, 64, 10_000):
            out = band_attention_reference(q, k, v, kinds=kinds, layout=layout, width=width, tile_rows=rows)
            assert float((out - expected).norm() / expected.norm()) < 1e-12
        out = band_attention(q.float(), k.float(), v.float(), kinds=kinds, layout=layout, width=width)
        assert out.dtype == torch.float32
        assert float((out - expected).norm() / expected.norm()) < 2e-6


DENSE_FRAMES = [TokenLayout(3, 5, 7, 4, 1), TokenLayout(6, 4, 5, 0, 1), TokenLayout(5, 3, 3, 2, 2)]


@pytest.mark.parametrize("layout", DENSE_FRAMES)
def test_dense_frames_see_all_and_are_seen_by_all(layout: TokenLayout) -> None:
    q, k, v = qkv(layout, 3, 16)
    rows = torch.randn(3, layout.num_tokens, 2, generator=torch.Generator().manual_seed(5)).double()
    term = Correction(rows, torch.randn(3, 16, 2, generator=torch.Generator().manual_seed(6)).double(), 0.3)
    for width in {1, 7, layout.num_video // 2}:
        expected = brute_force(q, k, v, kinds="sts", layout=layout, width=width)
        dense, banded = dense_and_band_attention(q, k, v, kinds="sts", layout=layout, width=width)
        for found in (banded, band_attention(q, k, v, kinds="sts", layout=layout, width=width)):
            torch.testing.assert_close(found, expected)
        torch.testing.assert_close(dense, dense_attention(q, k, v))
        out = torch.empty_like(q)
        band_attention(q, k, v, kinds="sts", layout=layout, width=width, corrections=(term,), out=out)
        torch.testing.assert_close(out, expected + 0.3 * rows @ term.directions.mT)
        # The sampled rows, which tell the head kinds, are under the same mask.
        sampled = sampled_rows(layout, 9)
        assert int(sampled.min()) >= layout.num_dense
        masks = torch.stack([whole_mask(layout, width, kind)[sampled] for kind in "st"])
        assert torch.equal(row_masks(layout, sampled, width), masks)
        assert int(masks[0].sum()) < masks[0].numel()


@pytest.mark.parametrize("kinds", ["ss", "st", "tt"])
def test_gradients_are_those_of_the_mask(kinds: str) -> None:
    layout = TokenLayout(3, 4, 5, 3)
    inputs = [x.requires_grad_() for x in qkv(layout, 2, 8, seed=3)]
    weight = torch.randn(2, layout.num_tokens, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    out = band_attention(*inputs, kinds=kinds, layout=layout, width=9)
    found = torch.autograd.grad((out * weight).sum(), inputs)
    expected = torch.autograd.grad((brute_force(*inputs, kinds=kinds, layout=layout, width=9) * weight).sum(), inputs)
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-10


@pytest.mark.parametrize("layout", [*LAYOUTS, *DENSE_FRAMES])
def test_density_is_the_share_of_the_mask(layout: TokenLayout) -> None:
    for width in {1, 2, 7, layout.num_video}:
        for kind in "st":
            visited = int(whole_mask(layout, width, kind).sum())
            assert visited == visited_pairs(layout, width)
            assert mask_density(layout, width) == visited / layout.num_tokens**2


@pytest.mark.parametrize("density", [0.06, 0.1, 0.25, 0.4, 0.999, 1.0])
def test_the_widest_band_that_is_not_denser(density: float) -> None:
    layout = TokenLayout(8, 10, 12, 11)
    width = band_width(layout, density)
    assert mask_density(layout, width) <= density
    assert width == layout.num_video or mask_density(layout, width + 1) > density


def test_place_major_order_and_its_inverse() -> None:
    layout = TokenLayout(3, 2, 5, 4)
    order, positions = place_major_order(layout), place_major_positions(layout)
    assert torch.equal(order[positions], torch.arange(30))
    # The first tokens in place-major order are place 0 in every frame.
    assert order[:3].tolist() == [0, 10, 20]


def test_what_does_not_fit_is_refused() -> None:
    layout = TokenLayout(2, 3, 4, 2)
    q, k, v = qkv(layout, 2, 8)
    with raises(ValueError, "density", 0.0):
        band_width(layout, 0.0)
    with raises(ValueError, "density", 1.5):
        band_width(layout, 1.5)
    with raises(ValueError, "density", 0.01, 0.1834):
        band_width(layout, 0.01)
    with raises(ValueError, "width", 0):
        band_attention(q, k, v, kinds="st", layout=layout, width=0)
    with raises(ValueError, "kinds", 2, "sx"):
        band_attention(q, k, v, kinds="sx", layout=layout, width=3)
    with raises(ValueError, "kinds", 2, "sss"):
        band_attention(q, k, v, kinds="sss", layout=layout, width=3)
    with raises(ValueError, 26, 25, TokenLayout(2, 3, 4, 1)):
        band_attention(q, k, v, kinds="st", layout=TokenLayout(2, 3, 4, 1), width=3)
    with raises(ValueError, "q", "k", "v", (2, 25, 8)):
        band_attention(q, k[:, 1:], v, kinds="st", layout=layout, width=3)
    with raises(ValueError, "flex", "cpu"):
        band_attention(q, k, v, kinds="st", layout=layout, width=3, implementation="flex")


@pytest.mark.parametrize("layout", [TokenLayout(3, 9, 17, 11), TokenLayout(4, 16, 16, 128), TokenLayout(2, 16, 24, 0)])
@pytest.mark.parametrize("width", [1, 100, 129, 300])
def test_the_blocks_for_flex_attention_are_those_of_the_mask(layout: TokenLayout, width: int) -> None:
    from reelquant.ops.band_attention.flex import BLOCK, band_block_mask

    width = min(width, layout.num_video - 1)
    blocks = band_block_mask(layout.num_video, layout.num_tokens, width, torch.device("cpu"), 0)
    mask, count = whole_mask(layout, width, "s"), -(-layout.num_tokens // BLOCK)
    assert blocks.kv_indices is not None
    assert blocks.full_kv_num_blocks is not None
    assert blocks.full_kv_indices is not None
    for row in range(count):
        partial = set(blocks.kv_indices[0, 0, row, : blocks.kv_num_blocks[0, 0, row]].tolist())
        full = set(blocks.full_kv_indices[0, 0, row, : blocks.full_kv_num_blocks[0, 0, row]].tolist())
        assert not partial & full
        for column in range(count):
            part = mask[row * BLOCK : (row + 1) * BLOCK, column * BLOCK : (column + 1) * BLOCK]
            assert (column in partial | full) == bool(part.any())
            assert column not in full or (bool(part.all()) and part.shape == (BLOCK, BLOCK))


def test_orders_are_exchanged_by_views_as_by_indices() -> None:
    from reelquant.ops.band_attention.flex import swap_orders

    layout = TokenLayout(3, 4, 5, 6)
    x = qkv(layout, 3, 2)[0].requires_grad_()
    order = torch.arange(layout.num_tokens)
    order[: layout.num_video] = place_major_order(layout)
    swapped = swap_orders(x, "sts", 3, 20)
    expected = torch.stack([x[0], x[1][order], x[2]])
    assert torch.equal(swapped, expected)
    assert torch.equal(swap_orders(swapped, "sts", 20, 3), x), "and back"
    assert swap_orders(x, "sss", 3, 20) is x
    weight = torch.randn(swapped.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    [found], [wanted] = (torch.autograd.grad((y * weight).sum(), x) for y in (swapped, expected))
    assert torch.equal(found, wanted)


def compiles(test: Callable[..., None]) -> Callable[..., None]:
    """Marks of a test that compiles for a GPU; torch warns itself there, of its own use of torch.jit and of `.grad`."""
    for mark in (
        pytest.mark.gpu,
        pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
        pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    ):
        test = mark(test)
    return test


@compiles
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_flex_attention_gives_the_reference(dtype: torch.dtype, head_dim: int) -> None:
    layout = TokenLayout(5, 11, 13, 9)
    inputs = [x.to("cuda", dtype).requires_grad_() for x in qkv(layout, 3, head_dim)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    weight = torch.randn(inputs[0].shape, device="cuda", generator=torch.Generator("cuda").manual_seed(9))
    out = band_attention(*inputs, kinds="sts", layout=layout, width=77, implementation="flex")
    expected = brute_force(*wide, kinds="sts", layout=layout, width=77)
    for a, b in zip(gradients(out, inputs, weight), gradients(expected, wide, weight), strict=True):
        error = float((a.double() - b).norm() / b.norm())
        assert error < (1e-2 if dtype == torch.bfloat16 else 3e-3), error


@compiles
def test_flex_attention_is_compiled_for_every_length_at_once() -> None:
    """torch would compile eight, then warn (an error here) and build the whole map."""
    for num_text in range(3, 15):
        layout = TokenLayout(4, 11, 13, num_text)
        inputs = [x.to("cuda", torch.bfloat16).requires_grad_() for x in qkv(layout, 2, 64, seed=num_text)]
        out = band_attention(*inputs, kinds="st", layout=layout, width=50 + num_text, implementation="flex")
        wide = [x.detach().double() for x in inputs]
        expected = brute_force(*wide, kinds="st", layout=layout, width=50 + num_text)
        assert float((out.detach().double() - expected).norm() / expected.norm()) < 1e-2, num_text
        assert all(bool(x.isfinite().all()) for x in torch.autograd.grad(out.float().square().sum(), inputs))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_flex_attention_is_compiled_once_for_all_kinds_of_heads_and_of_blocks(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch compiles for what its inputs are views of: a projection's output, a joined stream, temporal heads put in order."""
    from torch.nn.attention.flex_attention import flex_attention

    from reelquant.ops.band_attention import flex

    learns = device == "cuda"  # on a CPU FlexAttention has no gradients
    if not learns:  # what is compiled for is decided before any backend is asked; this one needs no compiler
        compiled = torch.compile(flex_attention, dynamic=True, backend="eager")
        monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    layout = TokenLayout(4, 11, 13, 5)
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if learns else torch.float32

    def drawn() -> Tensor:
        shape = 1, layout.num_tokens, 2, 64
        return torch.randn(shape, device=device, dtype=dtype, generator=generator).requires_grad_(learns)

    def attend(kinds: str, *projected: Tensor) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in projected)
        out = flex.band_attention_flex(q, k, v, kinds=kinds, layout=layout, width=60)
        if learns:
            out.float().square().sum().backward()
        return out.detach()

    q, k, v = drawn(), drawn(), drawn()
    spatial = attend("ss", q, k, v)
    with torch.compiler.set_stance("fail_on_recompile"):
        for kinds in ("ss", "st", "tt"):
            double = attend(kinds, torch.cat([q[:, :-5], q[:, -5:]], dim=1), k, v + 0)
            single = attend(kinds, q, k, v.flatten(2).unflatten(2, (2, 64)))
            assert torch.equal(double, single)
            assert torch.equal(double, spatial) == (kinds == "ss")


@compiles
@pytest.mark.parametrize("rows", [4500, 1800])
def test_dense_attention_has_the_same_gradients_every_time_where_torch_must(rows: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def drawn(length: int) -> Tensor:
        return torch.randn(2, length, 64, device="cuda", generator=generator).bfloat16().requires_grad_()

    inputs, weight = [drawn(rows), drawn(4500), drawn(4500)], drawn(rows).detach()
    asked = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (gradients(dense_attention(*inputs), inputs, weight) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(asked[0], warn_only=asked[1])
    q, k, v = (x.detach().double().requires_grad_() for x in inputs)
    expected = gradients((q @ k.transpose(1, 2) / 8).softmax(2) @ v, [q, k, v], weight)
    for a, b, wanted in zip(first, second, expected, strict=True):
        assert torch.equal(a, b)
        assert float((a.double() - wanted).norm() / wanted.norm()) < 1e-2


def gradients(out: Tensor, inputs: Sequence[Tensor], weight: Tensor) -> list[Tensor]:
    """And the output itself."""
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)]
