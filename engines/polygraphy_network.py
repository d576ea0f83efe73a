"""A network for polygraphy with the KVPrune plugin: `polygraphy convert engines/polygraphy_network.py`.

polygraphy's own --plugins opens a library without asking TensorRT to look into it; this asks. Set ONNX
to the file to parse and KV_PRUNE to the library.
"""

import os

import tensorrt as trt
from polygraphy.backend.trt import network_from_onnx_path


def load_network():
    """Called by polygraphy; returns builder, network and parser."""
    trt.get_plugin_registry().load_library(os.environ["KV_PRUNE"])
    return network_from_onnx_path(os.environ["ONNX"], strongly_typed=True)
