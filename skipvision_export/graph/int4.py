"""int4 weights by ONNX Runtime's own quantizer, and what numbers they stand for."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from skipvision_export.errors import ConfigError
from skipvision_export.graph.passes.int4_weights import BITS, BLOCK, Array, Int4Matrix, dequantized

Weights = Literal["int4"]
# MatMulNBits has no bfloat16 form on the CPU.
INT4_DTYPES = ("float32", "float16")


def check_weights(weights: str | None, dtype: str, reference: bool = False) -> Weights | None:
    """The kind of weights; raises ConfigError for one that there is not, or not in `dtype`.

    None: as they are, in `dtype`. reference: whether they are to stay in the model's files, which no
    quantized ones can.
    """
    if weights is None:
        return None
    kind: Weights | None = next((each for each in get_args(Weights) if each == weights), None)
    if kind is None:
        raise ConfigError(
            f"weights {weights!r} is not one of {', '.join(get_args(Weights))}; leave it out for full ones"
        )
    if reference:
        raise ConfigError(
            f"{kind} weights are new ones, which no file of the model holds; leave out --weights or "
            "--reference-weights"
        )
    if dtype not in INT4_DTYPES:
        raise ConfigError(
            f"int4 weights cannot be {dtype}: ONNX Runtime's {BITS}-bit product has no such kernel; use "
            f"dtype {' or '.join(INT4_DTYPES)}"
        )
    return kind


def quantize(matrix: Array) -> Int4Matrix:
    """A matrix [K, N] of float32 or float16 as ONNX Runtime's MatMulNBitsQuantizer makes it.

    Symmetric: each block of BLOCK numbers along K has a scale. With zero points as well the kernel takes 1.6
    times as long in decode, and the tiny VLM's answers are no better.
    """
    from onnxruntime.capi._pybind_state import quantize_matmul_4bits

    k, n = matrix.shape
    blocks = -(-k // BLOCK)
    # The kernel wants whole blocks, and rows of memory.
    padded = np.zeros((blocks * BLOCK, n), matrix.dtype)
    padded[:k] = matrix
    made = Int4Matrix(
        packed=np.zeros((n, blocks, BLOCK // 2), np.uint8),
        scales=np.zeros(n * blocks, matrix.dtype),
    )
    none = np.zeros(n * -(-blocks // 2), np.uint8)
    symmetric = True
    quantize_matmul_4bits(made.packed, padded, made.scales, none, BLOCK, n, k, symmetric)
    return made


def rounded_to_int4(matrix: Array) -> Array:
    """[K, N] float32: the numbers that int4 weights of a matrix stand for."""
    return dequantized(quantize(matrix), matrix.shape[0])
