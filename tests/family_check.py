"""What every family has to pass: parity dense and with skip and prune, and broken twins that are caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from damage import count_positions_one_further, held, instead_of_input, leave_as_it_is, twin
from PIL import Image

from skipvision_export import SkipVisionConfig
from skipvision_export.benchmark.parity import ParityReport, Prompt, measure_gaps
from skipvision_export.exporter import TracedModel, trace_skeleton
from skipvision_export.models.loading import resolve_model
from skipvision_export.runtime.pipeline import Bundle
from skipvision_export.runtime.prompt import load_image, prompt_text
from skipvision_export.runtime.torch_reference import TorchReference

LIMIT = 1e-4
PARITY = ("export", "rewrite", "backend")


@dataclass
class Subject:
    """A family's tiny checkpoint, traced once, and its bundle with skip and prune."""

    traced: TracedModel
    reference: TorchReference
    skip: Bundle

    @classmethod
    def make(cls, write: Callable[[Path], Path], folder: Path) -> Subject:
        """In a new folder, as `skipvision export` does: without loading the weights."""
        traced = trace_skeleton(resolve_model(write(folder / "model")))
        skip = traced.write(folder / "skip", config_of(traced))
        return cls(traced, TorchReference(traced.source), skip)

    def measure(self, bundle: Bundle, gaps: tuple[str, ...], steps: int, prompts: int = 2) -> ParityReport:
        """Gaps over pictures of several shapes, `steps` of generation each."""
        given = [Prompt(picture(size), "What is in the picture?") for size in SIZES[:prompts]]
        return measure_gaps(bundle, self.reference, given, max_new_tokens=steps, gaps=gaps)

    def dense(self, folder: Path) -> Bundle | None:
        """Nothing skipped; None where the number of tokens varies with the picture, which needs a preset."""
        if self.traced.source.family.tiled:
            return None
        return self.traced.write(folder, SkipVisionConfig.dense())

    def twins(self, folder: Path, steps: int) -> dict[str, float]:
        """The rewrite gap of each broken bundle; that of an intact one is within the limit."""
        found = {}
        family, config = self.traced.source.family, self.traced.source.config
        damages = list(TWINS)
        if family.sees != "before":
            damages.append(("decoder_prefill", see_only_before))
        if family.dynamic:
            damages += AXES
        if family.deepstack_layers(config):
            damages.append(("decoder_prefill", drop_deepstack))
        for graph, damage in damages:
            at = folder / f"{graph}-{damage.__name__}"
            intact = twin(self.skip, at, leave_as_it_is, graph)
            assert self.measure(intact, ("rewrite",), steps, 1).passed
            broken = self.measure(twin(self.skip, at, damage, graph), ("rewrite",), steps, 1)
            found[damage.__name__] = broken.gaps["rewrite"].overall.max_abs
        return found

    def own_pipeline(self, steps: int) -> float:
        """How far the dense reference is from generate() on all that the model's own processor returns."""
        processor, image = self.reference.processor, load_image(picture(SIZES[1]))
        question = "What is in the picture?"
        given = processor(images=image, text=prompt_text(processor, question), return_tensors="pt")
        given.pop("labels", None)  # PaliGemma's, for training
        with torch.no_grad():
            out = self.reference.model.generate(
                **given,
                max_new_tokens=steps,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        mine, _ = self.reference.run(self.reference.prepare(image, question), steps)
        assert mine.token_ids == out.sequences[0, given["input_ids"].shape[1] :].tolist()
        return max(
            float(np.abs(a - b[0].numpy()).max()) for a, b in zip(mine.logits, out.logits, strict=True)
        )


# The first in one crop where pictures are cropped, the second in several.
SIZES = ((96, 96), (200, 90))


def picture(size: tuple[int, int]) -> Image.Image:
    """Random blocks."""
    blocks = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size)


def config_of(traced: TracedModel) -> SkipVisionConfig:
    """The quarter preset, or for tiles the thumbnail and fewer merged tokens, with summaries."""
    family, config = traced.source.family, traced.source.config
    if not family.tiled:
        return SkipVisionConfig.preset("quarter")
    visual = family.visual_tokens(config)
    return SkipVisionConfig.counts(visual, visual // 2, summaries=True, selector="thumbnail", tiled=True)


# -- broken twins ------------------------------------------------------------------------------------


def let_a_row_pass_by(graph: ir.Graph) -> None:
    """The first row of the FFNs takes the place of the last one."""
    zero, end, one = (held(graph, str(n), [n]) for n in (0, -1, 1))

    def make(index: ir.Value) -> list[ir.Node]:
        head, tail = ir.node("Slice", [index, zero, end]), ir.node("Slice", [index, zero, one])
        return [head, tail, ir.node("Concat", [head.outputs[0], tail.outputs[0]], {"axis": 0})]

    instead_of_input(graph, "ffn_index", make)


def see_only_before(graph: ir.Graph) -> None:
    """Attention in prefill is causal, where it should also see its picture, or all of the prompt."""
    masks = {node.inputs[3] for node in graph if node.op_type == "Attention"}
    for mask in masks:
        wider = mask.producer()
        if wider.op_type != "Or":  # the last layer reads one row of it
            wider = wider.inputs[0].producer()
        ir.convenience.replace_all_uses_with(wider.outputs[0], wider.inputs[0])


def take_rows_for_columns(graph: ir.Graph) -> None:
    """The second and the third axis of positions change places."""
    order = held(graph, "axes", [0, 2, 1])
    instead_of_input(graph, "position_ids", lambda value: [ir.node("Gather", [value, order], {"axis": 0})])


def stay_on_one_axis(graph: ir.Graph) -> None:
    """Decode's positions on the column axis are those of the token before."""
    back = ir.Value(name="twin.back", const_value=ir.tensor(np.array([0, 0, -1], np.int64).reshape(3, 1, 1)))
    graph.register_initializer(back)
    instead_of_input(graph, "position_ids", lambda value: [ir.node("Add", [value, back])])


def put_tokens_elsewhere(graph: ir.Graph) -> None:
    """Laid-out tokens, summary tokens among them, stand one place behind their own."""
    places = graph.outputs[1]
    moved = ir.node("Add", [places, held(graph, "one", [1])])
    moved.outputs[0].name, places.name = places.name, "twin.places"
    moved.outputs[0].type, moved.outputs[0].shape = places.type, places.shape
    graph.append(moved)
    graph.outputs[1] = moved.outputs[0]


def drop_deepstack(graph: ir.Graph) -> None:
    """Visual tokens get no further features behind the first layers."""
    instead_of_input(graph, "deepstack_embeds", lambda value: [ir.node("Sub", [value, value])])


AXES = (
    ("decoder_prefill", take_rows_for_columns),
    ("decoder_decode", stay_on_one_axis),
    ("vision_encoder", put_tokens_elsewhere),
)
TWINS = (("decoder_prefill", let_a_row_pass_by), ("decoder_decode", count_positions_one_further))
