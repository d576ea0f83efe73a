"""Peak memory of a run, stated beforehand by counting what ONNX Runtime's CPU kernels hold at once."""

from __future__ import annotations

from skipvision_export.layout import TokenLayout
from skipvision_export.models import DecoderDims, VisionDims

# Python, numpy and ONNX Runtime with four small sessions; transformers' processor is not in it.
_BASE_BYTES = 120 << 20
_FLOAT = 4
# Of each pair of positions: the mask as booleans, twice while it is made.
_MASK_BYTES = 2
# What the embeddings' graph holds of the size of a hidden state: the rows of the table, those of the images,
# the two halves that Where makes, and its result. Allocators keep this memory for the graph's next run.
_EMBED_STATES = 5


def peak_memory(
    dims: DecoderDims, vision: VisionDims, layout: TokenLayout, prompt_tokens: int, images: int
) -> int:
    """Bytes of a whole process that prefills one float32 prompt in ONNX Runtime on the CPU.

    prompt_tokens: all of them, with `images` times the layout's. Weights once, the mapped embedding table
    left out; activations of the largest layer; K and V; the mask [S, S] that the last layer reads a row of.
    GroupQueryAttention holds no scores of that size; Attention does, which strict masks and batches of
    prompts with padding run: 4 bytes more for each head and pair. Measured against processes of 512 to 8,192
    tokens and 8 to 32 heads, see its test; the rest is what allocators round up and keep between the layers.
    """
    mask = prompt_tokens**2 * _MASK_BYTES
    weights = _FLOAT * (_decoder_weights(dims) + _vision_weights(vision))
    return _BASE_BYTES + weights + mask + _activations(dims, layout, prompt_tokens, images)


def _decoder_weights(dims: DecoderDims) -> int:
    d, q, kv = dims.hidden_size, dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim
    layer = 2 * d * q + 2 * d * kv + dims.ffn_weights
    return dims.num_layers * layer + d * dims.vocab_size


def _vision_weights(dims: VisionDims) -> int:
    d = dims.hidden_size
    layer = 4 * d * d + 2 * d * dims.intermediate_size
    projector = sum(inputs * outputs for inputs, outputs in dims.projector)
    return dims.num_layers * layer + 3 * dims.patch_size**2 * d + projector


def _activations(dims: DecoderDims, layout: TokenLayout, prompt_tokens: int, images: int) -> int:
    """The embeddings' states; then three hidden states, q, the attention's output, k and v, gate and up of
    the FFN's rows; the cache.
    """
    q, kv = dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim
    text = prompt_tokens - images * layout.total
    rows = text + images * max(layout.ffn_tokens(layer) for layer in range(dims.num_layers))
    kept = text + images * layout.kept_kv
    states = _EMBED_STATES + 3
    numbers = prompt_tokens * (states * dims.hidden_size + 2 * q + 2 * kv) + rows * 2 * dims.intermediate_size
    return _FLOAT * (numbers + kept * 2 * kv * dims.num_layers)
