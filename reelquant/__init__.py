"""Quantized and sparse video diffusion transformers.

Importing the package registers its checkpoint format with diffusers: after `import reelquant`,
`DiffusionPipeline.from_pretrained(path)` loads a compressed pipeline.
"""

from reelquant.diffusers_plugin import register

__all__ = ["register"]

register()
