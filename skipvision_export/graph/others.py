"""A decoder that another program exported: read it, find its FFNs by structure, rewrite it.

Nothing but the graph itself is looked at: no names of modules, no metadata. What the passes cannot prove
is refused.
"""

from __future__ import annotations

import contextlib
import re
from bisect import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common

from skipvision_export.errors import PassError
from skipvision_export.graph.clean import clear_inferred_types
from skipvision_export.graph.passes import SKIP_FFN_OPSET, SKIP_KV_OPSET, passes_for_others
from skipvision_export.graph.passes.cached_positions import CachedPositionsPass
from skipvision_export.graph.passes.names import FFN_INDEX, KV_KEEP_INDEX
from skipvision_export.graph.passes.regions import Branch, is_product
from skipvision_export.graph.passes.rowwise import rank
from skipvision_export.graph.passes.skip_ffn import find_ffns, is_one_row, token_input
from skipvision_export.graph.passes.split_norm import SplitNormPass

# `present.3.key`, `present_key_values_3_value`.
_KV_NAME = re.compile(r"^present\D*(\d+)\D*(key|value)s?$")
_KV_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class FoundFFN:
    """One FFN: where it stands, its operators, and the last node of it, the residual Add."""

    name: str
    form: str
    node: str


class OthersDecoder:
    """A decoder graph by whatever exporter, checked; `ffns` and `kv_names` say what was found in it."""

    def __init__(self, proto: onnx.ModelProto, folder: Path) -> None:
        """proto: without the numbers that stand in other files, which lie in `folder`.

        Raises PassError for what is no decoder, or one that cannot be rewritten.
        """
        self.opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
        taken = {value.name for value in proto.graph.input}
        done = next((name for name in (FFN_INDEX, KV_KEEP_INDEX) if name in taken), None)
        if done is not None:
            raise PassError(f"rewritten already: the graph takes {done}; give the one that it was made of")
        _check_opset(self.opset, SKIP_FFN_OPSET, "Skip-FFN")
        self._proto = proto
        self.model = ir.from_proto(_inferred(proto))
        ir.external_data.set_base_dir(self.model.graph, folder)
        common.InlinePass()(self.model)
        token_input(self.model.graph)
        SplitNormPass()(self.model)
        self.kv_names = kv_names(self.model.graph)
        branches = find_ffns(self.model.graph)
        _check_layers(self.model.graph, branches, self.kv_names)
        for ffn in branches:
            if is_one_row(ffn, token_input(self.model.graph)):
                raise PassError(
                    f"the FFN {ffn.scope} cannot be split: it gets one position of each sequence, and "
                    "nothing says which"
                )
        self.ffns = [FoundFFN(ffn.scope, _form(ffn), ffn.add.name or "?") for ffn in branches]

    @property
    def num_layers(self) -> int:
        """Decoder layers, each with one FFN."""
        return len(self.ffns)

    def decode(self) -> onnx.ModelProto:
        """The graph as it was, for a cache whose keys and values were pruned: positions are an input.

        Raises PassError as CachedPositionsPass does.
        """
        model = ir.from_proto(self._proto)
        common.InlinePass()(model)
        CachedPositionsPass()(model)
        return ir.to_proto(model)

    def rewrite(self, tiers: Sequence[int], keep_kv: bool = False) -> onnx.ModelProto:
        """Skip-FFN by tier of each layer and, unless `keep_kv`, Skip-KV; once.

        Raises PassError, which names the node, for what cannot be proved.
        """
        kv_names = [] if keep_kv else self.kv_names
        unnamed = [value.name for value in self.model.graph.outputs if rank(value) == 4]
        if unnamed and not keep_kv and not kv_names:
            raise PassError(
                f"{unnamed[0]} may be keys or values, but is not named present.N.key or present.N.value; "
                "give it such a name, or leave keys and values whole (--keep-kv)"
            )
        if kv_names:
            _check_opset(self.opset, SKIP_KV_OPSET, "Skip-KV", "; or leave keys and values whole (--keep-kv)")
            _check_kv(self.model.graph, kv_names)
        for each in passes_for_others(tiers, kv_names):
            each(self.model)
            common.RemoveUnusedNodesPass()(self.model)
        clear_inferred_types(self.model)
        names = Counter(node.name for node in self.model.graph)
        for i, node in enumerate(self.model.graph):
            if not node.name or names[node.name] > 1:
                node.name = f"skipvision/{node.op_type}_{i}"
        return ir.to_proto(self.model)


def _check_opset(found: int, least: int, what: str, otherwise: str = "") -> None:
    if found < least:
        raise PassError(
            f"the graph is of opset {found}; {what} puts in operators of opset {least}: export it with "
            f"opset {least} or later{otherwise}"
        )


def _inferred(proto: onnx.ModelProto) -> onnx.ModelProto:
    """With shapes: those that the file gives, what ONNX infers and, past its own operators, ONNX Runtime."""
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        text = str(error).split("\n")[0]
        raise PassError(f"the graph contradicts itself: {text}") from None
    known = {value.name for value in (*inferred.graph.value_info, *inferred.graph.output)}
    others = any(node.domain not in ("", "ai.onnx") for node in inferred.graph.node)
    if not others or all(name in known for node in inferred.graph.node for name in node.output if name):
        return inferred
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

    # Step by step: where it does not get to the end, its own function writes the graph to a file.
    inference = SymbolicShapeInference(2**31 - 1, auto_merge=False, guess_output_rank=False, verbose=0)
    inference._preprocess(inferred)
    # It raises many kinds on what it does not know; the passes refuse a shape that they miss, by name.
    with contextlib.suppress(Exception):
        while inference.run_:
            inference._infer_impl()
    return inference.out_mp_  # type: ignore[no-any-return]


def kv_names(graph: ir.Graph) -> list[str]:
    """Names of the K and V outputs, layer by layer; none where the graph gives no cache out."""
    found: dict[int, dict[str, str]] = {}
    for value in graph.outputs:
        match = _KV_NAME.match(value.name or "")
        if match:
            pair, name = found.setdefault(int(match[1]), {}), value.name or ""
            if match[2] in pair:
                both = f"{pair[match[2]]} and {name}"
                raise PassError(f"{both} are both the {match[2]} of a layer; expected one")
            pair[match[2]] = name
    names = []
    for i, layer in enumerate(sorted(found)):
        pair = found[layer]
        if i != layer or len(pair) != 2:
            raise PassError(f"the outputs {', '.join(pair.values())} are no key and value of layer {i}")
        names += [pair["key"], pair["value"]]
    return names


def _check_kv(graph: ir.Graph, names: Sequence[str]) -> None:
    """KVPrune takes [batch, heads, tokens, size] of floats."""
    outputs = {value.name: value for value in graph.outputs}
    for name in names:
        shape, kind = outputs[name].shape, outputs[name].dtype
        fits = shape is not None and len(shape) == 4 and isinstance(shape[1], int)
        if not fits or isinstance(shape[2], int) or kind not in _KV_TYPES:  # type: ignore[index]
            raise PassError(
                f"{name} cannot be pruned: it is {kind} {shape}, expected [batch, heads, tokens, size] of "
                "floats; leave keys and values whole (--keep-kv)"
            )


def _check_layers(graph: ir.Graph, ffns: Sequence[Branch], kv_names: Sequence[str]) -> None:
    """One FFN in each layer; where layers begin is told by their K."""
    if not ffns:
        raise PassError(
            "no decoder that can be split: no residual branch of the graph depends on the residual stream "
            "alone and holds a product by constant weights"
        )
    order = {node: i for i, node in enumerate(graph)}
    outputs = {value.name: value for value in graph.outputs}
    producers = [outputs[name].producer() for name in kv_names[::2]]
    starts = [order[node] for node in producers if node is not None]
    if len(starts) != len(kv_names) // 2 or starts != sorted(starts):
        raise PassError("the key outputs do not follow each other as layers do")
    layers: dict[int, Branch] = {}
    for ffn in ffns if starts else ():
        layer = bisect(starts, order[ffn.add]) - 1
        if layer in layers:
            raise PassError(
                f"two candidates for the FFN of layer {layer}: {layers[layer].scope} and {ffn.scope}; "
                "expected one residual branch with products in each layer"
            )
        layers[layer] = ffn
    missing = [layer for layer in range(len(starts)) if layer not in layers]
    if missing or -1 in layers:
        where = f"layer {missing[0]} has none" if missing else f"{layers[-1].scope} stands before the first"
        raise PassError(f"found {len(ffns)} FFNs in a decoder of {len(starts)} layers: {where}")


_NORMS = ("SimplifiedLayerNormalization", "RMSNormalization", "LayerNormalization")
_ACTIVATIONS = frozenset(
    "Sigmoid Gelu FastGelu QuickGelu BiasGelu Erf Tanh Relu Swish HardSwish Silu".split()
)


def _form(ffn: Branch) -> str:
    """Its operators in a few words, such as `RMSNormalization, 3 MatMul, Sigmoid`."""
    products = Counter(node.op_type for node in ffn.nodes if is_product(node))
    kinds = [node.op_type for node in ffn.nodes]
    norm = next((kind for kind in kinds if kind in _NORMS), "norm of simple operators")
    cut = [kind for kind in dict.fromkeys(kinds) if kind in ("Split", "Slice")]
    acts = [kind for kind in dict.fromkeys(kinds) if kind in _ACTIVATIONS]
    return ", ".join([norm, *(f"{n} {kind}" for kind, n in products.items()), *cut, *acts])
