"""KVPrune as a TensorRT plugin: the C++ library where there is one, else only its declaration.

The library is built from plugins/kv_prune; its README holds the contract.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from skipvision_export.errors import CompilerError
from skipvision_export.graph.passes.names import DOMAIN, DOMAIN_VERSION

NAME = "KVPrune"
# TensorRT's registry holds these for as long as the process lives, but does not own them.
_registered: list[object] = []


def load_library(trt: Any, file: Path) -> None:
    """Register the plugin of a library with TensorRT.

    Raises CompilerError for a missing library, one that cannot be loaded, or one of another version.
    """
    require_library(file)
    try:
        library = ctypes.CDLL(str(file.resolve()))
        get_version = library.skipvision_kv_prune_version
    except (OSError, AttributeError) as error:
        raise CompilerError(f"{file} is no KVPrune plugin library: {error}") from None
    get_version.restype = ctypes.c_char_p
    found = get_version().decode().split()[0]
    if found != str(DOMAIN_VERSION):
        raise CompilerError(
            f"{file} holds version {found} of {NAME}, expected {DOMAIN_VERSION}; build it again from the "
            "plugins/kv_prune of this release"
        )
    registry = trt.get_plugin_registry()
    if is_registered(trt):
        return
    registry.load_library(str(file.resolve()))
    if not is_registered(trt):
        raise CompilerError(f"TensorRT did not take {NAME} from {file}; build it for this TensorRT's headers")


def require_library(file: Path) -> None:
    """Raise CompilerError where there is no such file."""
    if not file.is_file():
        raise CompilerError(f"plugin library {file} does not exist; build it from plugins/kv_prune")


def is_registered(trt: Any) -> bool:
    """Whether a creator of the plugin is known to TensorRT."""
    return trt.get_plugin_registry().get_creator(NAME, str(DOMAIN_VERSION), DOMAIN) is not None


def declare(trt: Any) -> None:
    """Register a plugin that can be built into engines but not run: for builds ahead of time.

    The engine finds the library's plugin of the same name and version when it is loaded.
    """
    if is_registered(trt):
        return
    creator = _declaration(trt)
    trt.get_plugin_registry().register_creator(creator, DOMAIN)
    _registered.append(creator)


def _declaration(trt: Any) -> Any:
    float_types = (trt.DataType.FLOAT, trt.DataType.HALF, trt.DataType.BF16)

    class KVPrune(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):  # type: ignore[misc]
        """key, value [B, H, S, Dh], keep_index [B, K] int64 -> key, value [B, H, K, Dh]."""

        def __init__(self) -> None:
            trt.IPluginV3.__init__(self)
            trt.IPluginV3OneCore.__init__(self)
            trt.IPluginV3OneBuild.__init__(self)
            trt.IPluginV3OneRuntime.__init__(self)
            self.plugin_name, self.plugin_namespace = NAME, DOMAIN
            self.plugin_version, self.num_outputs = str(DOMAIN_VERSION), 2

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def get_output_data_types(self, types: list[Any]) -> list[Any]:
            return [types[0], types[1]]

        def get_output_shapes(self, inputs: list[Any], scalars: list[Any], builder: Any) -> list[Any]:
            shapes = []
            for tensor in inputs[:2]:
                shape = trt.DimsExprs(4)
                for axis in (0, 1, 3):
                    shape[axis] = tensor[axis]
                shape[2] = inputs[2][1]
                shapes.append(shape)
            return shapes

        def supports_format_combination(self, place: int, tensors: list[Any], num_inputs: int) -> bool:
            desc = tensors[place].desc
            if desc.format != trt.TensorFormat.LINEAR:
                return False
            if place == 2:
                return bool(desc.type == trt.DataType.INT64)
            return desc.type in float_types and desc.type == tensors[0].desc.type

        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            pass

        def get_fields_to_serialize(self) -> Any:
            return trt.PluginFieldCollection(_fields(trt))

        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            pass

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def set_tactic(self, tactic: int) -> None:
            pass

        def clone(self) -> Any:
            return KVPrune()

        def enqueue(self, *_: Any) -> None:
            raise RuntimeError(f"{NAME} is only declared; load the library that plugins/kv_prune builds")

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        """Makes the declaration."""

        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = NAME, DOMAIN, str(DOMAIN_VERSION)
            self.field_names = trt.PluginFieldCollection([])

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            return KVPrune()

    return Creator()


# Of what an engine holds of a KVPrune layer; the library refuses another one.
FORMAT_FIELD, FORMAT_VERSION = "format_version", 1
_format = np.array([FORMAT_VERSION], np.int32)  # TensorRT keeps a pointer to it


def _fields(trt: Any) -> list[Any]:
    return [trt.PluginField(FORMAT_FIELD, _format, trt.PluginFieldType.INT32)]
