"""Attention kernels beside what torch has; see `__main__`. Needs torch and triton alone."""

from benchmarks.attention_memory import import_without_diffusers

import_without_diffusers()
