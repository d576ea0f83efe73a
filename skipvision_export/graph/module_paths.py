"""Where the modules of a model stand in its graphs: the paths that tracing leaves on nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skipvision_export.errors import PassError
from skipvision_export.graph.passes.names import DECODE, PREFILL, RASTER_FEATURES, VISION
from skipvision_export.graph.passes.regions import module_path
from skipvision_export.graph.taps import Tap, leaving, module_taps

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import nn

    from skipvision_export.models import ModelFamily
    from skipvision_export.models.loading import ModelSource


class ModulePaths:
    """Paths such as `decoder.layers.3.mlp.up_proj`, those of the exported graphs.

    of: of every module of vision tower, projector, decoder and head; ffns: the first module of each FFN;
    vision_layers: of the tower, none where the graph computes them in another order than the model.
    """

    def __init__(self, model: Any, family: ModelFamily) -> None:
        """Takes a loaded model, or one without weights."""
        from skipvision_export.graph.wrappers import Decoder, VisionEncoder

        config = model.config
        decoder: Any = family.language_model(model)
        layers = family.decoder_layers(model)
        self.of: dict[nn.Module, str] = {m: name for name, m in Decoder(model, family).named_modules()}
        vision = {m: name for name, m in VisionEncoder(model, family).named_modules()}
        tower = list(family.vision_layers(model))[: family.vision_dims(config).num_layers]
        # With windows the tower's code sorts patches by window, the exported graph does not.
        self.vision_layers = [vision[layer] for layer in tower if family.window_side(config) is None]
        self.of |= {module: name for module, name in vision.items() if module not in self.of}
        self.ffns = [self.of[family.ffn(layer)[0]] for layer in layers]
        self.last_norm = self.of[decoder.norm]
        self.decoder_layers = [self.of[layer] for layer in layers]

    @classmethod
    def of_source(cls, source: ModelSource) -> ModulePaths:
        """Of a model's configuration alone, or of a bundle's: no weight is read or made."""
        import torch
        import transformers

        with torch.device("meta"):
            return cls(getattr(transformers, source.architecture)(source.config), source.family)

    def taps(self, name: str, graph: ir.Graph) -> list[Tap]:
        """What can be compared of a graph of a bundle, in graph order; none of the embeddings.

        Raises PassError where a layer is not in the graph.
        """
        if name == VISION:
            taps = [Tap(f"vision.layers.{i}", leaving(graph, p)) for i, p in enumerate(self.vision_layers)]
            raster = next((v for n in graph for v in n.outputs if v.name == RASTER_FEATURES), None)
            return [*taps, *([Tap(RASTER_FEATURES, raster)] if raster is not None else [])]
        if name.split(".")[0] not in (PREFILL, DECODE):
            return []
        behind = [*self._first(graph)[1:], self.last_norm]
        places = [
            place
            for i, (ffn, after) in enumerate(zip(self.ffns, behind, strict=True))
            for place in ((f"layers.{i}.attention", ffn), (f"layers.{i}.ffn", after))
        ]
        return module_taps(graph, places)

    def _first(self, graph: ir.Graph) -> list[str]:
        """The module of each decoder layer that computes first."""
        found = dict.fromkeys(self.decoder_layers, "")
        for node in graph:
            path = module_path(node)
            layer = next((layer for layer in self.decoder_layers if path.startswith(f"{layer}.")), None)
            if layer is not None:
                found[layer] = found[layer] or path
        for layer, path in found.items():
            if not path:
                raise PassError(
                    f"no node of the graph stands in module {layer}; its layers cannot be compared"
                )
        return list(found.values())
