"""What a GPU has to do, by kind, and how long that takes it at rates that were measured."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from pipeline.planning.meta_run import MetaRun

MATRIX_FLOPS, ATTENTION_FLOPS, FLOAT32_FLOPS = 780e12, 648e12, 67e12
"""Operations a second of one H100: bfloat16 matrix products (8192^3) and cuDNN attention (57,856 tokens, 24 heads of 128),
both measured; float32 matrix products without tensor cores, from the data sheet."""
FLEX_FLOPS = 410e12
"""FlexAttention's, compiled for any length, so that `EFFICIENCY` of it is what was measured: forward and backward of 25,696
and of 57,856 tokens in 88 and 430 ms (H100)."""
CONVOLUTION_FLOPS = 490e12
"""Operations a second such that decoding takes what it takes: 480 x 848 x 61 in 7.2 s on an H200 (torch's deterministic
algorithms; 5.7 s with any), 7.3 s by this."""
MOVED_BYTES = 3.016e12
"""Bytes a second of one H100, read and written: a copy of 2 GiB, measured."""
STORED_BYTES = 1.2e9
"""Bytes a second that a worker writes into the store in front of an SSD or in memory (measured: 1.1 to 1.36 GB/s)."""
EFFICIENCY = 0.8
"""Of these ceilings. HunyuanVideo-13B at 61 frames, estimated so and measured:

| | estimated | measured |
|---|---|---|
| denoising step at 720x1280, at 480x848 | 7.3, 2.1 s | 8.3, 2.3 s |
| with the salience hooks at 480x848 | 2.2 s | 2.4 s (H200) |
| distillation step at 720x1280, double and single block | 0.42, 0.42 s | 0.40, 0.39 s |
| seeing 40 % of the tokens | 0.20, 0.19 s | 0.20, 0.19 s |
| seeing 25 % | 0.14, 0.14 s | 0.15, 0.14 s |
| with attention's terms, seeing all, 40 and 25 % (double) | 0.45, 0.24, 0.18 s | 0.43, 0.25, 0.20 s |
"""


@dataclass(frozen=True)
class Operations:
    """Floating-point operations by kind, and bytes; adds up and scales."""

    matrix: float = 0.0
    convolution: float = 0.0
    attention: float = 0.0
    float32: float = 0.0
    moved: float = 0.0
    """Bytes that all else reads and writes."""
    stored: float = 0.0
    """Bytes written into the store, for which a GPU waits."""

    @classmethod
    def of(cls, run: MetaRun) -> Operations:
        """What a meta run counted."""
        return cls(
            run.matrix_flops, run.convolution_flops, run.attention_flops, run.float32_flops, moved=run.moved_bytes
        )

    def __add__(self, other: Operations) -> Operations:
        return Operations(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, factor: float) -> Operations:
        return Operations(*(mine * factor for mine in astuple(self)))

    @property
    def gpu_hours(self) -> float:
        """Hours of one H100 at `EFFICIENCY` of its ceilings, and of the store."""
        seconds = self.matrix / MATRIX_FLOPS + self.convolution / CONVOLUTION_FLOPS
        seconds += self.attention / ATTENTION_FLOPS + self.float32 / FLOAT32_FLOPS
        return ((seconds + self.moved / MOVED_BYTES) / EFFICIENCY + self.stored / STORED_BYTES) / 3600
