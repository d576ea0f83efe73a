"""Random faults in a bundle's graphs, and where each of them is."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from skipvision_export.graph.passes.regions import is_product, module_path
from skipvision_export.runtime.pipeline import Bundle

ATTENTION = ("Attention", "GroupQueryAttention")
NORMS = ("RMSNormalization", "LayerNormalization", "SkipSimplifiedLayerNormalization")


@dataclass(frozen=True)
class Fault:
    """A kind of fault in a part of a graph: `attention`, `ffn`, `all` layers, or a tensor's name."""

    kind: str
    graph: str
    layer: int | None
    part: str

    def __str__(self) -> str:
        return f"{self.kind}-{self.graph}-{self.layer}-{self.part}"


def inject(bundle: Bundle, folder: Path, fault: Fault, rng: np.random.Generator, token: int) -> Bundle:
    """A copy of the bundle with one fault, in every form of the graph; token: one that the prompt has."""
    shutil.copytree(bundle.folder, folder)
    seed = int(rng.integers(1 << 30))
    for file in (folder / "onnx").glob(f"{fault.graph}*.onnx"):
        if file.name.startswith(f"{fault.graph}.append"):
            continue
        model = ir.load(file)
        KINDS[fault.kind](model.graph, fault, np.random.default_rng(seed), token)
        ir.save(model, file)
    return Bundle.load(folder, verify=False)


def draw(rng: np.random.Generator, layers: int, vision_layers: int) -> Fault:
    """Any fault."""
    graph = str(
        rng.choice(
            ["vision_encoder", "embed_tokens", "decoder_prefill", "decoder_decode"], p=[0.25, 0.05, 0.4, 0.3]
        )
    )
    if graph == "embed_tokens":
        return Fault(str(rng.choice(["embedding", "placeholder"])), graph, None, "inputs_embeds")
    if graph == "vision_encoder":
        if rng.random() < 0.2:
            kind = str(rng.choice(["projector", "choice"]))
            return Fault(kind, graph, None, "image_features" + (".raster" if kind == "projector" else ""))
        kind = str(rng.choice(["weight", "scale", "epsilon", "head"]))
        return Fault(kind, graph, int(rng.integers(vision_layers)), "vision")
    if rng.random() < 0.1:
        return Fault("position", graph, None, "all")
    if rng.random() < 0.1:
        return Fault("head_weight", graph, None, "logits")
    layer = int(rng.integers(layers))
    kinds = ["weight", "scale", "epsilon", "head", "ffn_weight", "ffn_epsilon"]
    if graph == "decoder_prefill":
        kinds += ["keep_index"] + ["ffn_index"] * (layer < layers - 1)  # the last one reads no row but one
    kind = str(rng.choice(kinds))
    return Fault(
        kind.removeprefix("ffn_") if kind != "ffn_index" else kind,
        graph,
        layer,
        "ffn" if kind.startswith("ffn") else "attention",
    )


# -- kinds -------------------------------------------------------------------------------------------


def _of(graph: ir.Graph, fault: Fault) -> list[ir.Node]:
    """Nodes of the fault's layer and part."""
    found = []
    for node in graph:
        path = module_path(node)
        match = re.search(r"layers?\.(\d+)(?:\.|$)", path)
        if match is None or int(match[1]) != fault.layer:
            continue
        ffn = "mlp" in path or "post_attention" in path or "layer_norm2" in path
        if fault.part == "vision" or ffn == (fault.part == "ffn"):
            found.append(node)
    return found


def _replaced(graph: ir.Graph, node: ir.Node, at: int, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """One node reads a changed copy of a weight."""
    weight = node.inputs[at]
    array = change(np.array(weight.const_value.numpy()))
    value = ir.Value(name=f"{weight.name}.faulty", const_value=ir.tensor(array))
    value.type, value.shape = weight.type, weight.shape
    graph.register_initializer(value)
    node.replace_input_with(at, value)


def _one_number(graph: ir.Graph, nodes: list[ir.Node], rng: np.random.Generator) -> None:
    """One number of one matrix is off by three standard deviations."""
    products = [node for node in nodes if is_product(node)]
    node = products[rng.integers(len(products))]
    at = next(i for i, v in enumerate(node.inputs) if v is not None and v.is_initializer())

    def change(array: np.ndarray) -> np.ndarray:
        place = tuple(rng.integers(size) for size in array.shape)
        array[place] += 3 * array.std()
        return array

    _replaced(graph, node, at, change)


def weight(graph, fault, rng, token):
    _one_number(graph, _of(graph, fault), rng)


def scale(graph, fault, rng, token):
    """Attention's scale is off by a tenth."""
    node = next(node for node in _of(graph, fault) if node.op_type in ATTENTION)
    found = node.attributes.get("scale")
    size = {"vision": 12, "attention": 16}[fault.part]
    right = found.as_float() if found is not None and found.as_float() else size**-0.5
    node.attributes["scale"] = ir.AttrFloat32("scale", 1.1 * right)


def epsilon(graph, fault, rng, token):
    """A norm's epsilon is 1e-2."""
    nodes = [node for node in _of(graph, fault) if node.op_type in NORMS]
    node = nodes[rng.integers(len(nodes))]
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-2)


def head(graph, fault, rng, token):
    """The output projection takes the first head for the second."""
    node = next(
        node
        for node in _of(graph, fault)
        if is_product(node) and re.search(r"\.(o|out)_proj$", module_path(node))
    )
    at = next(i for i, v in enumerate(node.inputs) if v is not None and v.is_initializer())

    def change(array: np.ndarray) -> np.ndarray:
        size = array.shape[0] // 4
        return np.concatenate([array[size : 2 * size], array[:size], array[2 * size :]])

    _replaced(graph, node, at, change)


def _rolled(graph: ir.Graph, node: ir.Node, at: int, axis: int) -> None:
    """An index that is off by one place."""
    index = node.inputs[at]
    names = {}
    for name, number in (("one", 1), ("end", np.iinfo(np.int64).max), ("zero", 0), ("axis", axis)):
        value = ir.Value(
            name=f"faulty.{name}.{node.name}", const_value=ir.tensor(np.array([number], np.int64))
        )
        graph.register_initializer(value)
        names[name] = value
    tail = ir.node("Slice", [index, names["one"], names["end"], names["axis"]])
    first = ir.node("Slice", [index, names["zero"], names["one"], names["axis"]])
    both = ir.node("Concat", [tail.outputs[0], first.outputs[0]], {"axis": axis})
    graph.insert_before(node, [tail, first, both])
    node.replace_input_with(at, both.outputs[0])


def ffn_index(graph, fault, rng, token):
    """The FFN gets other rows than it gives back."""
    node = next(node for node in _of(graph, fault) if node.op_type == "Gather")
    _rolled(graph, node, 1, 0)


def keep_index(graph, fault, rng, token):
    """Keys and values of other positions are kept."""
    nodes = [node for node in graph if node.op_type == "KVPrune"]
    _rolled(graph, nodes[fault.layer], 2, 1)


def position(graph, fault, rng, token):
    """Each position is taken for the next."""
    from damage import count_positions_one_further

    count_positions_one_further(graph)


def embedding(graph, fault, rng, token):
    """One number of one word's embedding is wrong."""
    node = next(node for node in graph if node.op_type == "Gather" and module_path(node) == "embed")

    def change(array: np.ndarray) -> np.ndarray:
        array[token, rng.integers(array.shape[1])] += 3 * array.std()
        return array

    _replaced(graph, node, 0, change)


def placeholder(graph, fault, rng, token):
    """The features are taken one row too late."""
    node = next(node for node in graph if node.op_type == "Sub")
    zero = ir.Value(
        name="faulty.zero", const_value=ir.tensor(np.zeros_like(node.inputs[1].const_value.numpy()))
    )
    graph.register_initializer(zero)
    node.replace_input_with(1, zero)


def projector(graph, fault, rng, token):
    _one_number(graph, [node for node in graph if module_path(node).startswith("projector")], rng)


def choice(graph, fault, rng, token):
    """The least important tokens are retained."""
    node = next(node for node in graph if node.op_type == "TopK")
    lowest = 1 - (node.attributes["largest"].as_int() if "largest" in node.attributes else 1)
    node.attributes["largest"] = ir.AttrInt64("largest", lowest)


def head_weight(graph, fault, rng, token):
    _one_number(graph, [node for node in graph if module_path(node) == "head"], rng)


KINDS = {
    one.__name__: one
    for one in (
        weight,
        scale,
        epsilon,
        head,
        ffn_index,
        keep_index,
        position,
        embedding,
        placeholder,
        projector,
        choice,
        head_weight,
    )
}
