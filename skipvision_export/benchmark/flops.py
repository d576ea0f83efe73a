"""Floating-point operations and cache sizes: by formula, and counted over a graph's nodes.

A multiply and an add are two operations. Both count MatMul, Gemm and Attention only; norms,
activations and gathers are less than 1 % of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import onnx

from skipvision_export.graph.passes.int4_weights import OP
from skipvision_export.layout import TokenLayout
from skipvision_export.models import DecoderDims
from skipvision_export.models.checkpoint import DTYPE_BYTES


@dataclass(frozen=True)
class PrefillCost:
    """Cost of one prompt with one image: operations of the decoder, and cache bytes after it."""

    prefill_flops: int
    kv_bytes: int


def prefill_cost(
    dims: DecoderDims, layout: TokenLayout, text_tokens: int, dtype: str = "float32"
) -> PrefillCost:
    """By formula, for `text_tokens` and the visual tokens of one image.

    Every token goes through q, k, v and o and attends to the whole sequence; text and the tokens that
    the layout names go through a layer's FFN and stay in the cache. Of the last layer, all but the last
    position need K and V alone (see LastLayerPass); the head reads that position.
    """
    head = 2 * dims.hidden_size * dims.vocab_size
    return PrefillCost(
        prefill_flops=layers_flops(dims, layout, text_tokens, last_only=True) + head,
        kv_bytes=kv_bytes(dims, text_tokens + layout.kept_kv, dtype),
    )


def layers_flops(dims: DecoderDims, layout: TokenLayout, text_tokens: int, *, last_only: bool) -> int:
    """Operations of the decoder's layers; last_only: of the last layer one position is read."""
    length = text_tokens + layout.total
    d, q = dims.hidden_size, dims.num_heads * dims.head_dim
    kv = dims.num_kv_heads * dims.head_dim
    total = 0
    for layer in range(dims.num_layers):
        queries, rows = length, text_tokens + layout.ffn_tokens(layer)
        if last_only and layer == dims.num_layers - 1:
            queries = rows = 1
        total += 2 * length * d * 2 * kv  # k and v
        total += 2 * queries * 2 * d * q  # q and o
        total += 2 * 2 * queries * length * q
        total += 2 * rows * dims.ffn_products
    return total


def visual_flops_share(dims: DecoderDims, layout: TokenLayout, visual_tokens: int) -> float:
    """What is left of the visual tokens' operations in the decoder's linear layers.

    visual_tokens: of an image where nothing is merged or skipped. Every token of the layout goes
    through q, k, v and o of each layer, some through its FFN; Skip-Vision's FLOPs are these: 22.9 %
    for (100, 156) of 576 on LLaMA-3-8B.
    """
    d, q = dims.hidden_size, dims.num_heads * dims.head_dim
    attention = 2 * d * (q + dims.num_kv_heads * dims.head_dim)
    ffn = dims.ffn_products
    rows = sum(layout.ffn_tokens(layer) for layer in range(dims.num_layers))
    left = dims.num_layers * layout.total * attention + rows * ffn
    return left / (dims.num_layers * visual_tokens * (attention + ffn))


def kv_bytes(dims: DecoderDims, tokens: int, dtype: str = "float32") -> int:
    """Bytes of keys and values of `tokens` cached positions in all layers."""
    return 2 * dims.num_layers * dims.num_kv_heads * dims.head_dim * tokens * DTYPE_BYTES[dtype]


def count_flops(
    model: onnx.ModelProto, sizes: dict[str, int], experts_share: float = 1.0, *, known_only: bool = False
) -> int:
    """Count over a graph's MatMul (MatMulNBits too), Gemm and Attention nodes; weights need not be loaded.

    sizes: a number for each named dimension of the inputs, such as {"batch": 1, "sequence": 640}.
    experts_share: of a mixture, the share of experts that a row goes through.
    Raises ValueError where a node's shape does not follow from them, unless known_only: then such nodes
    are left out, and the number is a lower bound.
    """
    model = onnx.ModelProto.FromString(model.SerializeToString())
    _full_matrices(model.graph)
    picked = _pick_all(model.graph)
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param and (dim.dim_param in sizes or not known_only):
                dim.dim_value = sizes[dim.dim_param]
    for value in model.graph.output:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.ClearField("dim_param")
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output)
    }
    shapes |= {tensor.name: list(tensor.dims) for tensor in inferred.graph.initializer}

    def shape(name: str, node: onnx.NodeProto) -> list[int]:
        sizes_of = shapes.get(name)
        if not sizes_of or not all(sizes_of):
            raise ValueError(f"the shape of {name} at node {node.name} does not follow: {sizes_of}")
        return sizes_of

    def cost(node: onnx.NodeProto) -> int:
        if node.op_type == "MatMul":
            inner = shape(node.input[0], node)[-1]
            share = Fraction(experts_share).limit_denominator(4096) if node.output[0] in picked else 1
            return int(2 * math.prod(shape(node.output[0], node)) * inner * share)
        if node.op_type == "Gemm":
            trans = next((a.i for a in node.attribute if a.name == "transA"), 0)
            inner = shape(node.input[0], node)[0 if trans else 1]
            return 2 * math.prod(shape(node.output[0], node)) * inner
        if node.op_type == "Attention":
            batch, heads, queries, size = shape(node.input[0], node)
            keys = shape(node.input[1], node)[2]
            value_size = shape(node.input[2], node)[3]
            return 2 * batch * heads * queries * keys * (size + value_size)
        return 0

    total = 0
    for node in inferred.graph.node:
        try:
            total += cost(node)
        except ValueError:
            if not known_only:
                raise
    return total


def _pick_all(graph: onnx.GraphProto) -> set[str]:
    """Experts' rows, picked by NonZero, as all rows, whose number is known; returns what is made of them.

    Together the experts get each row as often as it has experts.
    """
    picked: set[str] = set()
    for node in graph.node:
        if node.op_type == "GatherND" and node.input[1] in picked:
            node.CopyFrom(onnx.helper.make_node("Identity", node.input[:1], node.output))
            picked.add(node.output[0])
        elif node.op_type == "ScatterND" and node.input[1] in picked:
            node.CopyFrom(onnx.helper.make_node("Identity", node.input[:1], node.output))
        elif node.op_type == "NonZero" or picked.intersection(node.input):
            picked.update(node.output)
    return picked


def _full_matrices(graph: onnx.GraphProto) -> None:
    """MatMulNBits as the MatMul it stands for: shape inference does not know the operator."""
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == OP:
            sizes = {attribute.name: attribute.i for attribute in node.attribute}
            shape, dtype = [sizes["K"], sizes["N"]], types[node.input[2]]
            graph.input.append(onnx.helper.make_tensor_value_info(f"{node.output[0]}.full", dtype, shape))
            full = onnx.helper.make_node("MatMul", [node.input[0], f"{node.output[0]}.full"], node.output)
            node.CopyFrom(full)
