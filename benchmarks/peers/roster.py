"""The settings that are compared: each tool's nearest to 4 and 8 bits, with and without quantized activations."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.peers.adapters import (
    GROUP_SIZE,
    Peer,
    bitsandbytes,
    gguf,
    modelopt,
    modelopt_through_diffusers,
    quanto,
    sdnq,
    torchao,
    torchao_intx,
    torchao_tinygemm,
    unchanged,
)


def _torchao_peers() -> tuple[Peer, ...]:
    row = partial(Peer, package="torchao")
    return (
        row(
            "torchao-w4a8",
            partial(torchao_intx, config="Int8DynamicActivationIntxWeightConfig", granularity="weight_granularity"),
            "int4, group 64",
            "int8, per token",
            "Int8DynamicActivationIntxWeightConfig(int4, PerGroup(64)); the layout that runs everywhere keeps int8",
            value_bits=4,
        ),
        row(
            "torchao-w4",
            partial(torchao_intx, config="IntxWeightOnlyConfig", granularity="granularity"),
            "int4, group 64",
            "-",
            "IntxWeightOnlyConfig(int4, PerGroup(64)); the layout that runs everywhere keeps int8",
            value_bits=4,
        ),
        row(
            "torchao-int4-tinygemm",
            torchao_tinygemm,
            "int4, group 64",
            "-",
            "Int4WeightOnlyConfig(64, TILE_PACKED_TO_4D): the bfloat16 kernel of CUDA",
            dtype="bfloat16",
        ),
        row(
            "torchao-int4-plain",
            partial(torchao, config="Int4WeightOnlyConfig", group_size=GROUP_SIZE),
            "int4, group 64",
            "-",
            "Int4WeightOnlyConfig(64): its default layout",
        ),
        row(
            "torchao-w8a8",
            partial(torchao, config="Int8DynamicActivationInt8WeightConfig"),
            "int8, per row",
            "int8, per token",
            "Int8DynamicActivationInt8WeightConfig()",
        ),
        row(
            "torchao-w8",
            partial(torchao, config="Int8WeightOnlyConfig"),
            "int8, per row",
            "-",
            "Int8WeightOnlyConfig()",
        ),
    )


def _quanto_peers() -> tuple[Peer, ...]:
    row, calibrated = partial(Peer, package="optimum-quanto"), "quantize(weights={}, activations=qint8), calibrated"
    static = "int8, per tensor, calibrated"
    return (
        row("quanto-w4", partial(quanto, weights="qint4"), "int4, group 96 or 128", "-", "quantize(weights=qint4)"),
        row(
            "quanto-w4a8",
            partial(quanto, weights="qint4", activations="qint8"),
            "int4, group 96 or 128",
            static,
            calibrated.format("qint4"),
        ),
        row("quanto-w8", partial(quanto, weights="qint8"), "int8, per row", "-", "quantize(weights=qint8)"),
        row(
            "quanto-w8a8",
            partial(quanto, weights="qint8", activations="qint8"),
            "int8, per row",
            static,
            calibrated.format("qint8"),
        ),
    )


def _sdnq_peers() -> tuple[Peer, ...]:
    def row(name: str, weights: str, activations: str = "-", **arguments: Any) -> Peer:
        words = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        return Peer(name, partial(sdnq, **arguments), weights, activations, f"SDNQConfig({words})", package="sdnq")

    return (
        row("sdnq-uint4", "uint4, group 64", weights_dtype="uint4"),
        row("sdnq-uint4-svd", "uint4, group 128, rank 32", weights_dtype="uint4", use_svd=True),
        row("sdnq-uint4-hadamard", "uint4, group 64, Hadamard", weights_dtype="uint4", use_hadamard=True),
        row("sdnq-int4-a8", "int4, group 64", "int8, per token", weights_dtype="int4", use_quantized_matmul=True),
        row("sdnq-int8", "int8, per row", weights_dtype="int8"),
        row("sdnq-int8-a8", "int8, per row", "int8, per token", weights_dtype="int8", use_quantized_matmul=True),
    )


def _bitsandbytes_peers() -> tuple[Peer, ...]:
    row = partial(Peer, package="bitsandbytes")
    return (
        row(
            "bnb-nf4", partial(bitsandbytes, bits=4), "nf4, block 64, scales in 8 bits", "-", "nf4, double quantization"
        ),
        row("bnb-int8", partial(bitsandbytes, bits=8), "int8, per row", "int8, per token", "LLM.int8(), threshold 6"),
    )


def _gguf_peers() -> tuple[Peer, ...]:
    row = partial(Peer, package="gguf")
    return (
        row("gguf-q4_0", partial(gguf, kind="Q4_0"), "int4, block 32", "-", "Q4_0"),
        row("gguf-q4_1", partial(gguf, kind="Q4_1"), "uint4, block 32", "-", "Q4_1"),
        row("gguf-q4_k", partial(gguf, kind="Q4_K"), "uint4, blocks of 32 in 256", "-", "Q4_K"),
        row("gguf-q8_0", partial(gguf, kind="Q8_0"), "int8, block 32", "-", "Q8_0"),
    )


def _modelopt_peers() -> tuple[Peer, ...]:
    def row(name: str, config: str, weights: str, activations: str, value_bits: float) -> Peer:
        setting = f"mtq.{config}, calibrated; simulated"
        if activations != "-":
            setting += "; without its quantizers of LayerNorms"
        quantize = partial(modelopt, config=config)
        return Peer(name, quantize, weights, activations, setting, package="nvidia-modelopt", value_bits=value_bits)

    return (
        row("modelopt-int4-awq", "INT4_AWQ_CFG", "int4, block 128, AWQ", "-", 4),
        row("modelopt-w4a8-awq", "W4A8_AWQ_BETA_CFG", "int4, block 128, AWQ", "fp8, per tensor, calibrated", 4),
        row("modelopt-nvfp4", "NVFP4_DEFAULT_CFG", "fp4, block 16", "fp4, block 16", 4.5),
        row(
            "modelopt-int8-smoothquant",
            "INT8_SMOOTHQUANT_CFG",
            "int8, per row, smoothed",
            "int8, per tensor, calibrated",
            8,
        ),
        row("modelopt-int8", "INT8_DEFAULT_CFG", "int8, per row", "int8, per tensor, calibrated", 8),
        Peer(
            "modelopt-int8-diffusers",
            modelopt_through_diffusers,
            "int8",
            "-",
            "diffusers' NVIDIAModelOptConfig('INT8')",
            package="nvidia-modelopt",
        ),
    )


REFERENCE = Peer("full_precision", unchanged, "-", "-", "the model itself")
_ROWS = (
    *_torchao_peers(),
    *_quanto_peers(),
    *_sdnq_peers(),
    *_bitsandbytes_peers(),
    *_gguf_peers(),
    *_modelopt_peers(),
    Peer("bfloat16", unchanged, "bfloat16", "bfloat16", "the model itself in bfloat16", dtype="bfloat16"),
)
PEERS = {peer.name: peer for peer in sorted(_ROWS, key=lambda peer: peer.weights.startswith("int8"))}
"""By name, in the order in which they run: 8 bits last, so that a run that is cut short has the rows of 4 bits."""
