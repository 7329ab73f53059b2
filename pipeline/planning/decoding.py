"""Peak memory and operations of decoding one video in tiles."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import torch

from pipeline.planning.meta_run import META, bytes_of, run_on_meta, tensors_of, to_dtype
from pipeline.planning.model_size import component_on_meta
from pipeline.planning.operations import Operations
from pipeline.planning.token_counts import TokenCounts


def decode_one(model: Path, counts: TokenCounts, dtype: torch.dtype) -> tuple[int, Operations]:
    """Peak bytes without the VAE's weights, which is that of its first tile, and twice the video, in tiles and put together,
    if there are others; and what is done, for all tiles as for the first."""
    vae = component_on_meta(model, "vae")
    if vae is None:
        return 0, Operations()
    decoder = cast(Any, to_dtype(vae, dtype))
    whole = counts.latent_shape
    tile = tuple(map(min, whole, (whole[0], *_tile_shape(decoder))))
    latents = torch.empty(1, *tile, dtype=dtype, device=META)
    run = run_on_meta(lambda: decoder.decode(latents, return_dict=False), holding=tensors_of(decoder))
    video = 2 * math.prod(counts.video_shape) * dtype.itemsize if tile != whole else 0
    pairs = zip(whole[1:], tile[1:], _tile_strides(decoder), strict=True)
    num_tiles = math.prod(1 if size == of_tile else math.ceil(size / stride) for size, of_tile, stride in pairs)
    return run.peak_bytes - bytes_of(decoder) + video, Operations.of(run) * num_tiles


def _tile_shape(vae: Any) -> tuple[int, int, int]:
    """Latents `(F, H, W)` that a VAE decodes at once when it tiles: a first tile of time has one frame more than later ones."""
    spatial, temporal = vae.spatial_compression_ratio, vae.temporal_compression_ratio
    return (
        vae.tile_sample_min_num_frames // temporal + 1,
        vae.tile_sample_min_height // spatial,
        vae.tile_sample_min_width // spatial,
    )


def _tile_strides(vae: Any) -> tuple[int, int, int]:
    """Latents from one tile to the next."""
    spatial, temporal = vae.spatial_compression_ratio, vae.temporal_compression_ratio
    return (
        vae.tile_sample_stride_num_frames // temporal,
        vae.tile_sample_stride_height // spatial,
        vae.tile_sample_stride_width // spatial,
    )
