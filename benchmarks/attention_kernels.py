"""Attention kernels beside what torch has, on the same random tensors in one process.

    python -m benchmarks.attention_kernels --output benchmarks/results/attention_kernels.json

At the tokens of HunyuanVideo at 720 x 1280 x 61 (16 x 45 x 80, and 256 of text), 24 heads of size 128, bf16, the columns of
one fused QKV matrix, on a CUDA GPU:

- ``dense``: torch's scaled_dot_product_attention by cuDNN and by FlashAttention 2, first and last (the clock drifts),
- ``band``: the Triton kernel for spatial, temporal and mixed heads over density, tile and load; FlexAttention,
- ``corrected``: the same with one or two rank-16 corrections in its epilogue,
- ``refresh``: dense and band in one pass,
- ``sums``: both passes of the column sums, and all of it,
- ``eight_bit``: attention in 8 bits over tiles, densities, dense and in one pass, and its quantization apart (in ms without
  it where the case does not say so), beside 16 bits; queries, keys and values of norm 1 with a few loud channels.

``--only`` names the groups to run (default: all but ``eight_bit``, which has its own record).

Milliseconds are medians of `triton.testing.do_bench`. TFLOP/s count `4 D` FLOP a pair that the mask leaves (`2 D` for one
pass of the column sums). Errors are relative, in the Frobenius norm, on sampled query rows against float64. A case that
fails is recorded with its error and the rest runs on; cases past `--budget` seconds are recorded as skipped. On a CPU
(`--device cpu`, TRITON_INTERPRET=1, small sizes) the figures only show that the script works. Needs torch and triton alone.

Predicted for the size above on an H100: band at density 0.15 450 TFLOP/s, refresh 90 ms, column sums 75 ms (cuDNN 63 ms);
in 8 bits band at density 0.15 750 TFLOP/s (8.4 ms), dense 54 ms, one pass 55 ms, quantization 0.6 ms, error 3 %.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.attention_memory import environment, import_without_diffusers

import_without_diffusers()

from reelquant.attention.band_mask import band_width, place_major_positions, visited_pairs  # noqa: E402
from reelquant.families.family import TokenLayout  # noqa: E402
from reelquant.ops.band_attention.launch import (  # noqa: E402
    TILES,
    Load,
    Tile,
    band_attention_triton,
    dense_and_band_triton,
)
from reelquant.ops.band_attention.reference import Correction, corrected  # noqa: E402
from reelquant.ops.column_sums import kernel as sums_kernel  # noqa: E402
from reelquant.ops.column_sums.op import column_sums  # noqa: E402
from reelquant.ops.eight_bit_attention import launch as eight_bit  # noqa: E402
from reelquant.ops.eight_bit_attention.op import eight_bit_attention  # noqa: E402
from reelquant.ops.eight_bit_attention.reference import KeysValues, Precision  # noqa: E402

SAMPLED_ROWS = 48
GROUPS = ("dense", "band", "corrected", "refresh", "sums", "flex")


@dataclass
class Case:
    """One measurement: `call` gives a tensor (or tensors) of which `error` says how wrong they are."""

    name: str
    call: Callable[[], Any]
    flop: float
    error: Callable[[Any], float] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    once: bool = False
    """Slow and only for comparison: its first call counts."""


class Problem(NamedTuple):
    """What all cases share."""

    q: Tensor
    k: Tensor
    v: Tensor
    layout: TokenLayout

    @property
    def dense_flop(self) -> float:
        heads, tokens, head_dim = self.q.shape
        return 4.0 * tokens**2 * heads * head_dim

    def band_flop(self, width: int) -> float:
        return 4.0 * visited_pairs(self.layout, width) * self.q.shape[0] * self.q.shape[2]


def drawn(layout: TokenLayout, heads: int, head_dim: int, device: torch.device) -> Problem:
    """Random q, k, v `[H, L, D]`, the columns of `[L, 3 H D]`."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    shape = (layout.num_tokens, 3, heads, head_dim)
    q, k, v = torch.randn(shape, generator=generator, device=device).to(dtype).permute(1, 2, 0, 3)
    return Problem(q, k, v, layout)


def loud(layout: TokenLayout, heads: int, head_dim: int, device: torch.device) -> Problem:
    """Like `drawn`, but every token of a head of root mean square 1, with four channels eight times as loud.

    In queries and keys they are loud by a mean, as in trained models. Values have none: a mean makes the relative error small.
    """
    q, k, v, _ = drawn(layout, heads, head_dim, device)
    generator = torch.Generator(device).manual_seed(2)
    for x in (q, k, v):
        gain = torch.ones(head_dim, device=device)
        gain[:: head_dim // 4] = 8
        mean = gain * torch.randn(heads, 1, head_dim, generator=generator, device=device)
        wide = x.float() * gain if x is v else x.float() + mean
        x.copy_(wide * wide.square().mean(2, keepdim=True).rsqrt())
    return Problem(q, k, v, layout)


def sampled_error(
    problem: Problem, kinds: str, width: int, corrections: tuple[Correction, ...] = ()
) -> Callable[..., float]:
    """Relative error of an attention `[H, L, D]` on sampled rows, first and last of the video and the text among them."""
    q, k, v, layout = problem
    n, tokens = layout.num_video, layout.num_tokens
    generator = torch.Generator().manual_seed(1)
    inner = torch.randint(tokens, (SAMPLED_ROWS,), generator=generator).tolist()
    rows = torch.tensor(sorted({0, n // 2, n - 1, min(n, tokens - 1), tokens - 1, *inner}), device=q.device)

    def error(out: Tensor) -> float:
        wrong, size = 0.0, 0.0
        for head, kind in enumerate(kinds):
            places = torch.arange(n, device=q.device)
            if kind == "t":
                places = place_major_positions(layout, q.device)
            video = rows.clamp(max=n - 1)
            far = (places[video][:, None] - places[None, :]).abs() >= width
            mask = torch.zeros(len(rows), tokens, dtype=torch.bool, device=q.device)
            mask[:, :n] = far & (rows < n)[:, None]
            scores = q[head, rows].double() @ k[head].double().T / q.shape[2] ** 0.5
            expected = scores.masked_fill(mask, float("-inf")).softmax(1) @ v[head].double()
            for term in corrections:
                expected += term.scale * (term.rows[head, rows].double() @ term.directions[head].double().T)
            wrong += float((out[head, rows].double() - expected).square().sum())
            size += float(expected.square().sum())
        return float((wrong / size) ** 0.5)

    return error


def dense_by(problem: Problem, backend: SDPBackend) -> Callable[[], Tensor]:
    """[H, L, D] by one backend of torch; it raises where that backend does not take the tensors."""
    q, k, v = (x.unsqueeze(0) for x in problem[:3])

    def call() -> Tensor:
        with sdpa_kernel([backend]):
            return scaled_dot_product_attention(q, k, v)[0]

    return call


def dense_cases(problem: Problem, *, fa2: bool) -> Iterator[Case]:
    heads = problem.q.shape[0]
    error = sampled_error(problem, "s" * heads, problem.layout.num_video)
    yield Case("dense cudnn", dense_by(problem, SDPBackend.CUDNN_ATTENTION), problem.dense_flop, error)
    if fa2:
        yield Case("dense fa2", dense_by(problem, SDPBackend.FLASH_ATTENTION), problem.dense_flop, error)


def band_case(
    problem: Problem, density: float, mix: str, *, tile: Tile | None = None, load: Load | None = None
) -> Case:
    kinds, width = mixed(problem.q.shape[0], mix), band_width(problem.layout, density)
    settings: dict[str, Any] = {"density": density, "kinds": mix, "tile": tile, "load": load}

    def call() -> Tensor:
        return band_attention_triton(
            problem.q, problem.k, problem.v, kinds=kinds, layout=problem.layout, width=width, tile=tile, load=load
        )

    return Case("band triton", call, problem.band_flop(width), sampled_error(problem, kinds, width), settings)


def mixed(heads: int, mix: str) -> str:
    """The heads' kinds for `s`, `t` or `st` (half and half)."""
    return (mix * heads)[:heads]


def sweep(problem: Problem, *, quick: bool) -> Iterator[Case]:
    """Tiles and loads at density 0.15."""
    tiles = TILES[problem.q.shape[2]]
    for tile in tiles[:3] if quick else tiles:
        for mix in ("s", "t"):
            yield band_case(problem, 0.15, mix, tile=tile)
    for tile in tiles[1:2] if quick else tiles[:3]:
        yield band_case(problem, 0.15, "t", tile=tile, load="pointers")
    if not quick:
        yield band_case(problem, 0.15, "s", tile=tiles[0], load="pointers")


def densities(problem: Problem, tile: Tile | None, *, quick: bool) -> Iterator[Case]:
    for density in (0.15, 0.25) if quick else (0.15, 0.25, 0.4):
        for mix in ("st",) if quick else ("s", "t", "st"):
            if density > 0.15 or mix == "st":
                yield band_case(problem, density, mix, tile=tile)


def corrected_cases(problem: Problem, tile: Tile | None) -> Iterator[Case]:
    heads, tokens, head_dim = problem.q.shape
    kinds, width = mixed(heads, "st"), band_width(problem.layout, 0.15)
    terms = tuple(
        Correction(
            torch.randn_like(problem.q[..., :16]), torch.randn(heads, head_dim, 16, device=problem.q.device), scale
        )
        for scale in (1.0, 0.5)
    )
    options: dict[str, Any] = {"kinds": kinds, "layout": problem.layout, "width": width, "tile": tile}
    for num in (1, 2):
        flop = problem.band_flop(width) + 2.0 * num * heads * tokens * head_dim * 16
        error = sampled_error(problem, kinds, width, terms[:num])
        settings = {"density": 0.15, "kinds": "st", "tile": tile, "corrections": num}

        def call(num: int = num) -> Tensor:
            return band_attention_triton(*problem[:3], corrections=terms[:num], **options)

        yield Case("band corrected", call, flop, error, settings)
    yield Case(
        "band, then corrected",
        lambda: corrected(band_attention_triton(*problem[:3], **options), terms[:1]),
        problem.band_flop(width),
        None,
        {"density": 0.15, "kinds": "st", "tile": tile, "corrections": 1},
    )


def refresh_cases(problem: Problem, *, quick: bool) -> Iterator[Case]:
    heads = problem.q.shape[0]
    width = band_width(problem.layout, 0.15)
    for mix in ("st",) if quick else ("s", "st"):
        kinds = mixed(heads, mix)
        of_dense = sampled_error(problem, kinds, problem.layout.num_video)
        of_band = sampled_error(problem, kinds, width)
        for tile in TILES[problem.q.shape[2]][: 1 if quick else 2]:
            options: dict[str, Any] = {"kinds": kinds, "layout": problem.layout, "width": width, "tile": tile}
            yield Case(
                "refresh, one pass",
                partial(dense_and_band_triton, *problem[:3], **options),
                problem.dense_flop,
                partial(_worse_of_both, of_dense, of_band),
                {"density": 0.15, "kinds": mix, "tile": tile},
            )


def _worse_of_both(of_dense: Callable[[Tensor], float], of_band: Callable[[Tensor], float], both: Any) -> float:
    return max(of_dense(both[0]), of_band(both[1]))


def sums_cases(problem: Problem, *, quick: bool) -> Iterator[Case]:
    q, k, half = problem.q, problem.k, problem.dense_flop / 2
    lse = sums_kernel.row_normalizers(q, k)
    expected = column_sums(q, k, implementation="reference").double()

    def error(sums: Tensor) -> float:
        return float((sums.double() - expected).norm() / expected.norm())

    tiles = sums_kernel.TILES[q.shape[2]]
    for tile in tiles[:3] if quick else tiles:
        settings = {"tile": tile}
        yield Case("sums pass 1", partial(sums_kernel.row_normalizers, q, k, tile=tile), half, None, settings)
        call = partial(sums_kernel.key_sums, q, k, lse, tile=tile)
        yield Case("sums pass 2", call, half, lambda sums: error(sums.sum(0, dtype=torch.float64)), settings)
    yield Case("sums", lambda: sums_kernel.column_sums_triton(q, k), 2 * half, error)
    if not quick:
        yield Case("sums reference", lambda: column_sums(q, k, implementation="reference"), 2 * half, once=True)


def eight_bit_cases(problem: Problem, rows: list[dict[str, Any]]) -> Iterator[Case]:
    """`rows`: of the cases so far, which say the fastest tile."""
    q, k, v, layout = problem
    heads, _, head_dim = q.shape
    kinds, width = mixed(heads, "st"), band_width(layout, 0.15)
    options: dict[str, Any] = {"kinds": kinds, "layout": layout}
    kept = eight_bit.quantize_keys_values_triton(k, v, precision="int8_fp8", **options)
    yield band_case(problem, 0.15, "st")
    tiles = eight_bit.TILES[head_dim]
    for tile in tiles:
        yield eight_bit_band(problem, kept, 0.15, tile)
    done = [row for row in rows if row["case"] == "band int8_fp8" and row["ms"]]
    done.sort(key=lambda row: float(row["ms"]))
    best = [eight_bit.EightBitTile(**row["tile"]) for row in done[:2]] or [tiles[0]]
    yield eight_bit_both(problem, kept, 0.15, best[0])
    yield eight_bit_band(problem, kept, 1.0, best[0])
    call = partial(eight_bit.quantize_keys_values_triton, k, v, precision="int8_fp8", **options)
    yield Case("quantize int8_fp8", call, 0.0)
    yield eight_bit_band(problem, kept, 0.25, best[0])
    terms = tuple(
        Correction(torch.randn_like(q[..., :16]), torch.randn(heads, head_dim, 16, device=q.device), scale)
        for scale in (1.0, 0.5)
    )
    for num in (1, 2):
        yield eight_bit_band(problem, kept, 0.15, best[0], corrections=terms[:num])
    yield Case(
        "quantize + int8_fp8",
        lambda: eight_bit.eight_bit_attention_triton(q, call(), width=width, tile=best[0]),
        problem.band_flop(width),
        sampled_error(problem, kinds, width),
        {"density": 0.15, "kinds": "st", "tile": best[0]},
    )
    yield from dense_cases(problem, fa2=False)
    for tile in [x for x in tiles if x not in best][:2]:
        yield eight_bit_both(problem, kept, 0.15, tile)
    yield eight_bit_band(problem, kept, 1.0, best[-1])
    for density in (0.15, 1.0):
        width_of = layout.num_video if density == 1 else width
        yield Case(
            "reference int8_fp8",
            partial(eight_bit_attention, q, kept, width=width_of, implementation="reference"),
            problem.band_flop(width_of),
            sampled_error(problem, kinds, width_of),
            {"density": density, "kinds": "st"},
            once=True,
        )
    del kept
    wide = eight_bit.quantize_keys_values_triton(k, v, precision="int8_16", **options)
    for tile in (eight_bit.EightBitTile(64, 64, 4, 3), eight_bit.EightBitTile(128, 64, 8, 3)):
        yield eight_bit_band(problem, wide, 0.15, tile, precision="int8_16")
    yield eight_bit_band(problem, wide, 1.0, eight_bit.EightBitTile(64, 64, 4, 3), precision="int8_16")


def eight_bit_band(
    problem: Problem,
    kept: KeysValues,
    density: float,
    tile: eight_bit.EightBitTile,
    *,
    corrections: tuple[Correction, ...] = (),
    precision: Precision = "int8_fp8",
) -> Case:
    width = problem.layout.num_video if density == 1 else band_width(problem.layout, density)
    call = partial(
        eight_bit.eight_bit_attention_triton, problem.q, kept, width=width, tile=tile, corrections=corrections
    )
    settings = {"density": density, "kinds": "st", "tile": tile, "corrections": len(corrections)}
    error = sampled_error(problem, kept.kinds, width, corrections)
    name = f"dense {precision}" if density == 1 else f"band {precision}"
    return Case(name, call, problem.band_flop(width), error, settings)


def eight_bit_both(problem: Problem, kept: KeysValues, density: float, tile: eight_bit.EightBitTile) -> Case:
    width = band_width(problem.layout, density)
    of_dense = sampled_error(problem, kept.kinds, problem.layout.num_video)
    of_band = sampled_error(problem, kept.kinds, width)
    call = partial(eight_bit.eight_bit_dense_and_band_triton, problem.q, kept, width=width, tile=tile)
    settings = {"density": density, "kinds": "st", "tile": tile}
    return Case("one pass int8_fp8", call, problem.dense_flop, partial(_worse_of_both, of_dense, of_band), settings)


def flex_cases(problem: Problem, *, quick: bool) -> Iterator[Case]:
    from reelquant.ops.band_attention.flex import band_attention_flex

    kinds = "s" * problem.q.shape[0]
    for density in (0.15,) if quick else (0.15, 0.25):
        width = band_width(problem.layout, density)
        options: dict[str, Any] = {"kinds": kinds, "layout": problem.layout, "width": width}
        yield Case(
            "band flex",
            partial(band_attention_flex, *problem[:3], **options),
            problem.band_flop(width),
            sampled_error(problem, kinds, width),
            {"density": density, "kinds": "s"},
        )


def measured(case: Case, device: torch.device, deadline: float) -> dict[str, Any]:
    """The case's settings with `ms`, `tflops` and `error`, or with `failed`."""
    row: dict[str, Any] = {"case": case.name, **case.settings, "ms": None, "tflops": None, "error": None}
    row["tile"] = asdict(case.settings["tile"]) if case.settings.get("tile") else None
    if time.perf_counter() > deadline:
        return row | {"failed": "skipped: the time budget is spent"}
    try:
        begin = time.perf_counter()
        result = case.call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        row["first_s"] = time.perf_counter() - begin
        row["error"] = None if case.error is None else case.error(result)
        del result
        row["ms"] = 1e3 * row["first_s"] if case.once else median_ms(case.call, device)
        row["tflops"] = case.flop / row["ms"] / 1e9
    except Exception as error:  # noqa: BLE001 - one failing case must not end the run; its text is in the result
        row["failed"] = f"{type(error).__name__}: {str(error)[-400:]}"
    return row


def median_ms(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        from triton.testing import do_bench

        return float(do_bench(call, warmup=50, rep=300, return_mode="median"))
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)


def fastest(rows: list[dict[str, Any]], default: Tile) -> Tile:
    """The tile with the least sum over both kinds of heads among those that ran for both."""
    spent: dict[Tile, list[float]] = {}
    for row in rows:
        if row["case"] == "band triton" and row["ms"] and row.get("load") is None:
            spent.setdefault(Tile(**row["tile"]), []).append(row["ms"])
    whole = {tile: sum(ms) for tile, ms in spent.items() if len(ms) == 2}
    return min(whole, key=whole.__getitem__, default=default)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'case':<21}{'density':>8}{'kinds':>6}{'tile':>15}{'load':>9}{'ms':>9}{'TFLOP/s':>9}{'error':>10}"]
    for row in rows:
        tile = "{rows}x{columns}x{warps}w{stages}".format(**row["tile"]) if row["tile"] else "-"
        if row["tile"] and not row["tile"].get("promote", True):
            tile += "c"
        if row["tile"] and row["tile"].get("registers"):
            tile += "r"
        if row.get("corrections"):
            tile += f"+{row['corrections']}"
        density, kinds, load = (row.get(name) or "-" for name in ("density", "kinds", "load"))
        start = f"{row['case']:<21}{density:>8}{kinds:>6}{tile:>15}{load:>9}"
        if row["ms"] is None:
            lines.append(f"{start}  {row['failed'][:90]}".replace("\n", " "))
        else:
            error = "-" if row["error"] is None else f"{row['error']:.1e}"
            lines.append(f"{start}{row['ms']:>9.2f}{row['tflops']:>9.0f}{error:>10}")
    return "\n".join(lines)


def all_rows(
    layout: TokenLayout, heads: int, head_dim: int, *, device: torch.device, groups: Sequence[str], options: Any
) -> list[dict[str, Any]]:
    """Every case of `groups` measured; which tile the later ones take depends on the sweep."""
    deadline, rows, quick = time.perf_counter() + options.budget, [], options.quick
    default = TILES[head_dim][0]

    def run(cases: Callable[[], Iterator[Case]]) -> None:
        try:
            for case in cases():
                rows.append(measured(case, device, deadline))
                print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
        except Exception as error:  # noqa: BLE001 - as in `measured`: what a group prepares may fail too
            name = getattr(cases, "__name__", "cases")
            rows.append(
                {"case": name, "tile": None, "ms": None, "failed": f"{type(error).__name__}: {str(error)[-400:]}"}
            )

    if "eight_bit" in groups:
        run(lambda: eight_bit_cases(loud(layout, heads, head_dim, device), rows))
    if set(groups) <= {"eight_bit"}:
        return rows
    problem = drawn(layout, heads, head_dim, device)
    cases: dict[str, Callable[[], Iterator[Case]]] = {
        "dense": lambda: dense_cases(problem, fa2=True),
        "band": lambda: sweep(problem, quick=quick),
        "densities": lambda: densities(problem, fastest(rows, default), quick=quick),
        "corrected": lambda: corrected_cases(problem, fastest(rows, default)),
        "refresh": lambda: refresh_cases(problem, quick=quick),
        "sums": lambda: sums_cases(problem, quick=quick),
        "dense again": lambda: dense_cases(problem, fa2=False),
        "flex": lambda: flex_cases(problem, quick=quick),
    }
    for name, group in cases.items():
        if {"densities": "band", "dense again": "dense"}.get(name, name) in groups:
            run(group)
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=int, nargs=3, default=(16, 45, 80), metavar=("FRAMES", "HEIGHT", "WIDTH"))
    parser.add_argument("--text", type=int, default=256, help="text tokens")
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--head-dim", type=int, default=128, choices=(64, 128))
    parser.add_argument("--budget", type=float, default=110.0, help="seconds after which no further case starts")
    parser.add_argument("--only", nargs="+", default=GROUPS, choices=(*GROUPS, "eight_bit"), help="groups to run")
    parser.add_argument("--quick", action="store_true", help="fewer tiles, densities and kinds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the result")
    options = parser.parse_args(arguments)

    import triton

    device = torch.device(options.device)
    frames, height, width = options.grid
    layout = TokenLayout(frames, height, width, options.text)
    rows = all_rows(layout, options.heads, options.head_dim, device=device, groups=tuple(options.only), options=options)
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "device")}
    document = {
        "environment": environment(device) | {"triton": triton.__version__, "cudnn": torch.backends.cudnn.version()},
        "settings": settings | {"dtype": "bfloat16" if device.type == "cuda" else "float16"},
        "results": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
