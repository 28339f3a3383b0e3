"""Weights in few bits: blocks of 4-bit numbers as MatMulNBits reads them, columns of 8-bit ones.

The onnxruntime-training 1.19.2 wheel has the kernels, but not `quantize_matmul_4bits`, which
onnxruntime's own MatMul4BitsQuantizer is made of.

Shapes as suffixes: N outputs, K inputs, G blocks of a row, S block size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_MAX_4, _ZERO_4 = 15, 8
_MAX_8 = 127
#: Zero point of 8-bit weights.
ZERO_8 = 128


@dataclass(frozen=True)
class Int4:
    """A matrix in blocks of 4-bit numbers along its inputs: w = (q - zero point) x scale.

    Attributes:
        packed_NGB: two numbers a byte, the first in the low half; uint8.
        scales_NG: float32.
        zero_points_N: two a byte, rows padded to whole bytes, uint8; None: 8 everywhere.
    """

    packed_NGB: np.ndarray
    scales_NG: np.ndarray
    zero_points_N: np.ndarray | None


def quantize_int4(rows_NK: np.ndarray, block_size: int, symmetric: bool) -> Int4:
    """Quantize the rows of a matrix, rounding to nearest.

    Args:
        rows_NK: outputs by inputs; a last block that isn't full is filled with zeros.
        symmetric: each block's scale puts its largest magnitude at -8, and 0 at 8; otherwise scale
            and zero point spread 0 to 15 between its least and largest number.
    """
    blocks_NGS = _blocks(rows_NK, block_size)
    if symmetric:
        index = np.abs(blocks_NGS).argmax(-1, keepdims=True)
        scales = np.take_along_axis(blocks_NGS, index, -1) / -_ZERO_4
        numbers = np.round(_divide(blocks_NGS, scales)) + _ZERO_4
        packed_zeros = None
    else:
        low = np.minimum(blocks_NGS.min(-1, keepdims=True), 0)  # 0 itself stays exact
        scales = (np.maximum(blocks_NGS.max(-1, keepdims=True), 0) - low) / _MAX_4
        zeros = np.clip(np.round(_divide(-low, scales)), 0, _MAX_4)
        numbers = np.round(_divide(blocks_NGS, scales)) + zeros
        packed_zeros = _pack(zeros[..., 0].astype(np.uint8))
    packed = _pack(np.clip(numbers, 0, _MAX_4).astype(np.uint8))
    return Int4(packed, scales[..., 0].astype(np.float32), packed_zeros)


def dequantize_int4(quantized: Int4, num_inputs: int) -> np.ndarray:
    """The matrix (N, K) that a product with the quantized one multiplies by, float32."""
    numbers = _unpack(quantized.packed_NGB).astype(np.float32)
    num_blocks = quantized.scales_NG.shape[1]
    if quantized.zero_points_N is None:
        zeros_NG1 = np.full((1, 1, 1), _ZERO_4, np.float32)
    else:
        zeros_NG1 = _unpack(quantized.zero_points_N)[:, :num_blocks, None].astype(np.float32)
    rows = (numbers - zeros_NG1) * quantized.scales_NG[..., None]
    return rows.reshape(len(rows), -1)[:, :num_inputs]


def quantize_int8(rows_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantize each row to 8 bits about a zero point of 128.

    Unsigned numbers: ONNX Runtime's products of unsigned by signed ones saturate on processors with
    AVX2 or AVX-512 and without VNNI (its documentation, "Quantize ONNX models", U8S8).

    Returns:
        (N, K) uint8 and scales (N,) float32: w = (q - 128) x scale.
    """
    scales_N = np.abs(rows_NK).max(1) / _MAX_8
    numbers = np.round(_divide(rows_NK, scales_N[:, None])) + ZERO_8
    return numbers.astype(np.uint8), scales_N.astype(np.float32)


def dequantize_int8(numbers_NK: np.ndarray, scales_N: np.ndarray) -> np.ndarray:
    """The matrix that 8-bit rows stand for, float32."""
    return (numbers_NK.astype(np.float32) - ZERO_8) * scales_N[:, None]


def _blocks(rows_NK: np.ndarray, block_size: int) -> np.ndarray:
    rows = rows_NK.astype(np.float32)
    missing = -rows.shape[1] % block_size
    if missing:
        rows = np.pad(rows, ((0, 0), (0, missing)))
    return rows.reshape(len(rows), -1, block_size)


def _divide(numbers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """A block of zeros has scale 0."""
    return np.divide(numbers, scales, out=np.zeros_like(numbers), where=scales != 0)


def _pack(numbers: np.ndarray) -> np.ndarray:
    if numbers.shape[-1] % 2:
        numbers = np.pad(numbers, [(0, 0)] * (numbers.ndim - 1) + [(0, 1)])
    return numbers[..., 0::2] | (numbers[..., 1::2] << 4)


def _unpack(packed: np.ndarray) -> np.ndarray:
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)
