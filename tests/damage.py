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


def instead_of_input(graph, name, make):
    """What reads an input reads the output of the last of the nodes that `make(input)` gives."""
    value = next(v for v in graph.inputs if v.name == name)
    users = [(use.node, use.idx) for use in value.uses()]
    nodes = make(value)
    for node, at in users:
        node.replace_input_with(at, nodes[-1].outputs[0])
    graph.insert_before(graph[0], nodes)


def held(graph, name, numbers):
    """An initializer of int64 numbers."""
    value = ir.Value(name=f"twin.{name}", const_value=ir.tensor(np.array(numbers, np.int64)))
    graph.register_initializer(value)
    return value


def see_the_padding(graph):
    """Prefill with a mask of ones."""
    one = held(graph, "one", 1)
    instead_of_input(graph, "attention_mask", lambda mask: [ir.node("Max", [mask, one])])


def longest_row_s_positions(graph):
    """Decode at the longest row's position in all rows."""

    def make(positions):
        last = ir.node("ReduceMax", [positions], attributes={"keepdims": 0})
        return [last, ir.node("Max", [positions, last.outputs[0]])]

    instead_of_input(graph, "position_ids", make)


def count_positions_one_further(graph):
    """Each position is taken for the next one."""
    one = held(graph, "one", 1)
    instead_of_input(graph, "position_ids", lambda positions: [ir.node("Add", [positions, one])])


def another_mask(node):
    """An Attention node reads a mask that no other one reads, as with a sliding window."""
    both = ir.node("Not", [node.inputs[3]])
    node.graph.insert_before(node, both)
    node.replace_input_with(3, both.outputs[0])


def causal(node):
    """An Attention node masks by itself."""
    node.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)
