"""Peak memory of a run, stated beforehand: by formula, with constants measured on ONNX Runtime's CPU."""

from __future__ import annotations

from skipvision_export.layout import TokenLayout
from skipvision_export.models import DecoderDims, VisionDims

# Python, numpy and ONNX Runtime with four small sessions; transformers' processor is not in it.
_BASE_BYTES = 120 << 20
_FLOAT = 4
# Beside Attention's scores: their mask as numbers, and what the arena keeps of it. In bytes for each pair of
# positions; with few heads the integers that the mask is made of take more than scores and mask together.
_MASK_BYTES = 20
_MASK_MAKING_BYTES = 48


def peak_memory(
    dims: DecoderDims, vision: VisionDims, layout: TokenLayout, prompt_tokens: int, images: int
) -> int:
    """Bytes of a whole process that prefills one float32 prompt in ONNX Runtime on the CPU.

    prompt_tokens: all of them, with `images` times the layout's. Weights once, the mapped embedding table
    left out; activations of the largest layer; scores [H, S, S], which Attention holds at once; K and V.
    Source: peaks of processes of 256 to 3,072 tokens and 4 to 16 heads, see its test.
    """
    scores = prompt_tokens**2 * max(_FLOAT * dims.num_heads + _MASK_BYTES, _MASK_MAKING_BYTES)
    weights = _FLOAT * (_decoder_weights(dims) + _vision_weights(vision))
    return _BASE_BYTES + weights + scores + _activations(dims, layout, prompt_tokens, images)


def _decoder_weights(dims: DecoderDims) -> int:
    d, q, kv = dims.hidden_size, dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim
    layer = 2 * d * q + 2 * d * kv + 3 * d * dims.intermediate_size
    return dims.num_layers * layer + d * dims.vocab_size


def _vision_weights(dims: VisionDims) -> int:
    d, out = dims.hidden_size, dims.projector_hidden
    layer = 4 * d * d + 2 * d * dims.intermediate_size
    return dims.num_layers * layer + 3 * dims.patch_size**2 * d + out * (d + out)


def _activations(dims: DecoderDims, layout: TokenLayout, prompt_tokens: int, images: int) -> int:
    """Three hidden states, q, the attention's output, k and v, gate and up of the FFN's rows; the cache."""
    q, kv = dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim
    text = prompt_tokens - images * layout.total
    rows = text + images * max(layout.ffn_tokens(layer) for layer in range(dims.num_layers))
    kept = text + images * layout.kept_kv
    numbers = prompt_tokens * (3 * dims.hidden_size + 2 * q + 2 * kv) + rows * 2 * dims.intermediate_size
    return _FLOAT * (numbers + kept * 2 * kv * dims.num_layers)
