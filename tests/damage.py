"""Broken twins: a bundle's copy with one graph damaged."""

import shutil

import numpy as np
import onnx_ir as ir

from skipvision_export.runtime.pipeline import Bundle


def twin(bundle, tmp_path, damage, graph="decoder_prefill"):
    """A copy of the bundle whose `graph` went through damage(ir.Graph), and its forms for one runtime too."""
    folder = shutil.copytree(bundle.folder, tmp_path / damage.__name__)
    for file in (folder / "onnx").glob(f"{graph}*.onnx"):
        model = ir.load(file)
        damage(model.graph)
        ir.save(model, file)
    return Bundle.load(folder, verify=False)


def leave_as_it_is(graph):
    """Not broken: what an unbroken twin goes through."""


def see_the_padding(graph):
    """Prefill with a mask of ones."""
    mask = next(v for v in graph.inputs if v.name == "attention_mask")
    users = [(use.node, use.idx) for use in mask.uses()]
    one = ir.Value(name="twin.one", const_value=ir.tensor(np.array(1, np.int64)))
    graph.register_initializer(one)
    ones = ir.node("Max", [mask, one])
    for node, at in users:
        node.replace_input_with(at, ones.outputs[0])
    graph.insert_before(graph[0], ones)


def longest_row_s_positions(graph):
    """Decode at the longest row's position in all rows."""
    positions = next(v for v in graph.inputs if v.name == "position_ids")
    users = [(use.node, use.idx) for use in positions.uses()]
    last = ir.node("ReduceMax", [positions], attributes={"keepdims": 0})
    same = ir.node("Max", [positions, last.outputs[0]])
    for node, at in users:
        node.replace_input_with(at, same.outputs[0])
    graph.insert_before(graph[0], [last, same])


def another_mask(node):
    """An Attention node reads a mask that no other one reads, as with a sliding window."""
    both = ir.node("Not", [node.inputs[3]])
    node.graph.insert_before(node, both)
    node.replace_input_with(3, both.outputs[0])


def causal(node):
    """An Attention node masks by itself."""
    node.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)
