"""Skip-KV: drop the keys and values of skipped tokens inside the prefill graph."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from skipvision_export.errors import PassError
from skipvision_export.graph.passes.matching import has_input, made_by, require
from skipvision_export.graph.passes.names import DOMAIN, DOMAIN_VERSION, KV_KEEP_INDEX, present_names

OP = "KVPrune"


class KVPrunePass(ir.passes.InPlacePass):
    """Put one KVPrune node behind each layer's K and V.

    present.i.key and .value [B, H, S, Dh] become [B, H, K, Dh]: the positions of `kv_keep_index`
    [B, K] int64, ascending in each row; in a graph that takes a past S counts that and the new tokens.
    Attention goes on reading the full K and V. The node has a model-local function as its body, so
    that any ONNX runtime runs it, and names the TensorRT plugin that replaces it where one is loaded.

    Raises PassError where a layer lacks a key or value output.
    """

    def __init__(self, num_layers: int, names: Sequence[str] = ()) -> None:
        """num_layers: decoder layers; names: of each K and V, by default `present.i.key`, `.value`."""
        super().__init__()
        self.names = tuple(names) or tuple(present_names("present", num_layers))

    def requires(self, model: ir.Model) -> None:
        """Once."""
        require(not has_input(model, KV_KEEP_INDEX), "KVPrune runs once")

    def ensures(self, model: ir.Model) -> None:
        """No layer gives its full K or V out."""
        present = [value for value in model.graph.outputs if value.name in self.names]
        left = [value.name for value in present if made_by(value, OP) is None]
        if left:
            raise ir.passes.PostconditionError(f"{left[0]} is not pruned")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the prefill graph in place."""
        graph = model.graph
        keep = ir.Value(
            name=KV_KEEP_INDEX,
            type=ir.TensorType(ir.DataType.INT64),
            shape=ir.Shape(["batch", "kept"]),
        )
        graph.inputs.append(keep)
        outputs = {value.name: i for i, value in enumerate(graph.outputs)}
        for layer, names in enumerate(zip(self.names[::2], self.names[1::2], strict=True)):
            missing = [name for name in names if name not in outputs]
            if missing:
                raise PassError(f"the prefill graph has no output {missing[0]}")
            full = [graph.outputs[outputs[name]] for name in names]
            pruned = []
            for name, value in zip(names, full, strict=True):
                assert value.shape is not None
                value.name = f"{name}.full"
                b, h, _, d = value.shape
                shape = ir.Shape([b, h, "kept", d])
                pruned.append(ir.Value(name=name, type=value.type, shape=shape))
            node = ir.Node(
                DOMAIN,
                OP,
                [*full, keep],
                [
                    ir.AttrString("plugin_namespace", DOMAIN),
                    ir.AttrString("plugin_version", str(DOMAIN_VERSION)),
                ],
                outputs=pruned,
                version=DOMAIN_VERSION,
                name=f"{OP}_{layer}",
            )
            last = max((v.producer() for v in full), key=_position(graph))
            assert last is not None
            graph.insert_after(last, node)
            for name, value in zip(names, pruned, strict=True):
                graph.outputs[outputs[name]] = value
        function = kv_prune_function(model.opset_imports[""])
        model.functions[function.identifier()] = function
        model.opset_imports[DOMAIN] = DOMAIN_VERSION
        return ir.passes.PassResult(model, modified=True)


def _position(graph: ir.Graph):  # type: ignore[no-untyped-def]
    order = {node: i for i, node in enumerate(graph)}
    return lambda node: order[node]


def kv_prune_function(opset: int) -> ir.Function:
    """The body of KVPrune in standard operators.

    A gather of whole rows from [B*H*S, Dh]: row (b*H + h)*S + keep_index[b, k]. GatherElements would
    need the index at every element.
    """
    key, value, keep = (ir.Value(name=name) for name in ("key", "value", "keep_index"))
    t = tape.Tape()

    def const(*values: int, scalar: bool = False) -> ir.Value:
        array = np.array(values[0] if scalar else values, np.int64)
        return t.op("Constant", [], {"value": ir.tensor(array)})

    one, minus_one = const(1), const(-1)
    lead = t.op("Shape", [key], {"start": 0, "end": 2})  # [B, H]
    heads = t.op("Shape", [key], {"start": 1, "end": 2})
    length = t.op("Shape", [key], {"start": 2, "end": 3})
    size = t.op("Shape", [key], {"start": 3, "end": 4})
    batch = t.op("Shape", [key], {"start": 0, "end": 1})
    kept = t.op("Shape", [keep], {"start": 1, "end": 2})
    count = t.op("Mul", [batch, heads])
    blocks = t.op(
        "Range", [const(0, scalar=True), t.op("Squeeze", [count]), const(1, scalar=True)]
    )  # b*H + h
    starts = t.op("Mul", [blocks, length])
    lead_one = t.op("Concat", [batch, heads, one], {"axis": 0})
    starts = t.op("Reshape", [starts, lead_one], {"allowzero": 1})  # [B, H, 1]
    positions = t.op("Unsqueeze", [keep, one])  # [B, 1, K]
    rows = t.op("Add", [starts, positions])  # [B, H, K]
    flat_rows = t.op("Reshape", [rows, minus_one])
    out_shape = t.op("Concat", [lead, kept, size], {"axis": 0})
    # Not [-1, Dh]: with B, H or S = 0 a -1 could not be inferred.
    total = t.op("Mul", [count, length])
    flat_shape = t.op("Concat", [total, size], {"axis": 0})
    results = []
    for tensor, name in ((key, "pruned_key"), (value, "pruned_value")):
        flat = t.op("Reshape", [tensor, flat_shape], {"allowzero": 1})
        picked = t.op("Gather", [flat, flat_rows], {"axis": 0})
        out = t.op("Reshape", [picked, out_shape], {"allowzero": 1})
        out.name = name
        results.append(out)
    graph = ir.Graph([key, value, keep], results, nodes=t.nodes, opset_imports={"": opset}, name=OP)
    return ir.Function(DOMAIN, OP, "", graph=graph, attributes=[])
