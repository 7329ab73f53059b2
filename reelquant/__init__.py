"""Quantized and sparse video diffusion transformers.

Importing the package registers its checkpoint format with diffusers, as soon as diffusers is imported: after
`import reelquant`, `DiffusionPipeline.from_pretrained(path)` loads a compressed pipeline.
"""

from reelquant.registration import register, register_when_imported

__all__ = ["register"]

register_when_imported()
