"""Broken twins: a bundle's copy with one graph damaged."""

import shutil

import onnx_ir as ir

from skipvision_export.runtime.pipeline import Bundle


def twin(bundle, tmp_path, damage, graph="decoder_prefill"):
    """A copy of the bundle whose `graph` went through damage(ir.Graph); prefill in each of its forms."""
    folder = shutil.copytree(bundle.folder, tmp_path / damage.__name__)
    forms = f"{graph}*.onnx" if graph == "decoder_prefill" else f"{graph}.onnx"
    for file in (folder / "onnx").glob(forms):
        model = ir.load(file)
        damage(model.graph)
        ir.save(model, file)
    return Bundle.load(folder, verify=False)


def leave_as_it_is(graph):
    """Not broken: what an unbroken twin goes through."""
