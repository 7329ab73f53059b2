"""Codes of 2 to 8 bits packed without gaps; the layout stands with the operation that expands them."""

from reelquant.ops.weight_expansion.bit_stream import pack_bits, pack_int4, unpack_bits, unpack_int4

__all__ = ["pack_bits", "pack_int4", "unpack_bits", "unpack_int4"]
