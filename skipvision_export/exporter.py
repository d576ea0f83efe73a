"""From a Hugging Face model to a bundle: load, trace once, rewrite, write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipvision_export.bundle import (
    MANIFEST,
    Manifest,
    ModelInfo,
    Roles,
    SourceInfo,
    atomic_folder,
    check_genai,
    check_output,
    check_reference,
    check_room,
    file_table,
    write_genai,
    write_graphs,
)
from skipvision_export.config import SkipVisionConfig
from skipvision_export.errors import ConfigError, ModelError
from skipvision_export.graph.passes import PassContext
from skipvision_export.graph.passes.names import DECODE, GENAI, ONNXRUNTIME, PREFILL
from skipvision_export.layout import TokenLayout
from skipvision_export.models.checkpoint import Checkpoint
from skipvision_export.models.loading import (
    ModelSource,
    check_full,
    copy_companions,
    load_model,
    load_processor,
    resolve_model,
)
from skipvision_export.models.reader import SourceReader

if TYPE_CHECKING:
    from skipvision_export.graph.trace import Trace
    from skipvision_export.runtime.pipeline import Bundle

DTYPES = ("float32", "float16", "bfloat16")
TARGETS = (ONNXRUNTIME, GENAI)
_TOOLS = ("skipvision-export", "torch", "transformers", "onnx", "onnx-ir", "onnxscript")

Progress = Callable[[str], None]


@dataclass
class TracedModel:
    """A model and its untouched graphs, from which bundles of any configuration are written.

    model: the loaded model, or None where the graphs refer to the checkpoint's weights.
    """

    source: ModelSource
    model: Any
    trace: Trace
    dtype: str

    def write(
        self,
        out: Path,
        config: SkipVisionConfig,
        force: bool = False,
        weights: str | None = None,
        reference_weights: bool = False,
        target: str = ONNXRUNTIME,
    ) -> Bundle:
        """Rewrite the graphs for `config` and write a bundle; atomic.

        target: the runtime that it is for; genai gets what `write_genai` says beside the rest.
        weights: what the decoder's matrices become; None leaves them in the traced type.
        reference_weights: those of `trace_skeleton` that keep their type are linked, see `export`.
        """
        from skipvision_export.graph.as_stored import turn_in_graph
        from skipvision_export.graph.int4 import check_weights, quantize
        from skipvision_export.graph.passes.int4_weights import Int4WeightsPass
        from skipvision_export.graph.passes.pack_projections import PackProjectionsPass
        from skipvision_export.graph.rewrite import rewrite
        from skipvision_export.graph.trace import OPSET
        from skipvision_export.models.weights import pack
        from skipvision_export.runtime.chat import read_chat
        from skipvision_export.runtime.pipeline import Bundle, eos_tokens

        check_output(out, force)
        kind = check_weights(weights, self.dtype, reference_weights)
        family, hf_config = self.source.family, self.source.config
        config = family.fitted(hf_config, config)
        dims = family.decoder_dims(hf_config)
        visual = family.visual_tokens(hf_config)
        layout = check_target(self.source, config, self.dtype, target)
        context = PassContext(
            num_layers=dims.num_layers,
            vision_layers=family.vision_dims(hf_config).num_layers,
            visual_tokens=visual,
            config=config,
            layout=layout,
            sees=family.sees,
            max_positions=family.max_positions(hf_config),
            summary=_summary_weights(self.source) if layout.summaries else {},
            # A link can only be to a matrix as it is stored.
            pack=None if reference_weights else PackProjectionsPass(pack),
            int4=Int4WeightsPass(quantize) if weights else None,
            target=target,
            width=dims.hidden_size if family.dynamic else None,
            deepstack=family.deepstack_layers(hf_config),
        )
        rewritten = rewrite(self.trace, context)
        with atomic_folder(out, force) as folder:
            models = rewritten.graphs | rewritten.variants
            if reference_weights:
                for model in models.values():
                    turn_in_graph(model)
            shared = tuple(name for name in models if name.split(".")[0] in (PREFILL, DECODE))
            reader = SourceReader(self.source.folder)
            written = write_graphs(models, folder, shared, "decoder.onnx_data", reader, reference_weights)
            copy_companions(self.source.folder, folder)
            if target == GENAI:
                write_genai(folder, self.source, eos_tokens(folder, load_processor(folder)))
            manifest = Manifest(
                source=SourceInfo(
                    name=self.source.name,
                    family=family.name,
                    architecture=self.source.architecture,
                    sha256=reader.sha256,
                ),
                preset=config.name,
                config=config.to_json(),
                roles=Roles(
                    retained=layout.retained,
                    skipped=layout.skipped,
                    summaries=layout.summaries,
                    layout=list(layout.runs),
                    tiers=list(layout.tiers),
                    layer_tiers=list(layout.layer_tiers),
                ),
                model=ModelInfo(
                    **asdict(dims),
                    visual_tokens=visual,
                    tiled=family.tiled,
                    merge_size=family.merge_size(hf_config),
                    deepstack=family.deepstack_layers(hf_config),
                    image_token_id=family.image_token_id(hf_config),
                    max_positions=context.max_positions,
                ),
                prompt=read_chat(folder),
                dtype=self.dtype,
                weights=kind,
                opset=OPSET,
                graphs={name: written.graphs[name] for name in rewritten.graphs},
                variants={name: written.graphs[name] for name in rewritten.variants},
                tools={tool: version(tool) for tool in _TOOLS},
                files=file_table(folder, written.files),
                referenced=written.referenced,
            )
            manifest = manifest.write(folder / MANIFEST)
        return Bundle(out, manifest)


def trace_model(
    source: ModelSource, dtype: str = "float32", progress: Progress = lambda _: None
) -> TracedModel:
    """Load the weights and trace the unpatched model, once for any number of bundles."""
    from skipvision_export.graph.trace import trace

    _check(source, dtype)
    progress("loading weights")
    model = load_model(source, dtype)
    steps = trace(model, source.family, lambda graph: progress(f"tracing {graph}"))
    return TracedModel(source, model, steps, dtype)


def trace_skeleton(
    source: ModelSource, dtype: str = "float32", progress: Progress = lambda _: None
) -> TracedModel:
    """The same graphs without loading the weights: they stay in the checkpoint until `write`.

    Takes a few seconds and some hundred megabytes, however large the model is.
    """
    from skipvision_export.graph.trace import trace
    from skipvision_export.models.skeleton import load_skeleton

    _check(source, dtype)
    progress("laying out the model")
    skeleton = load_skeleton(source, dtype)
    steps = trace(skeleton.model, source.family, lambda graph: progress(f"tracing {graph}"), skeleton.weights)
    return TracedModel(source, None, steps, dtype)


def check_target(source: ModelSource, config: SkipVisionConfig, dtype: str, target: str) -> TokenLayout:
    """The layout of a configuration, where the runtime that a bundle is for can run it.

    Raises ConfigError for a configuration that does not fit the model, or not the target.
    """
    if target not in TARGETS:
        raise ConfigError(f"target {target!r} is not supported; supported: {', '.join(TARGETS)}")
    layout = source.family.layout(source.config, config)
    if target == GENAI:
        check_genai(layout, source.family, dtype)
    return layout


def _check(source: ModelSource, dtype: str) -> Checkpoint:
    """What can be refused before the long part, such as a summary that does not fit."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    _summary_weights(source)
    return check_full(source)


def export(
    model: str | Path,
    out: str | Path,
    config: SkipVisionConfig | None = None,
    *,
    dtype: str = "float32",
    weights: str | None = None,
    reference_weights: bool = False,
    target: str = ONNXRUNTIME,
    force: bool = False,
    revision: str | None = None,
    progress: Progress = lambda _: None,
) -> Bundle:
    """Export a Hugging Face VLM (a folder or a Hub id) to a bundle at `out`.

    config: by default the one that the model was fine-tuned with, which it carries. weights: "int4"
    makes the decoder's matrices MatMulNBits of ONNX Runtime; by default they are of `dtype`.
    reference_weights: weights that are of `dtype` already are not copied; the bundle holds hard links to
    the model's files, so it needs their file system, and must be exported again once they are changed
    (moved or deleted they may be). target: "genai" adds what onnxruntime-genai needs to run a dense
    bundle. What can be refused without the weights is refused before they load.
    Raises ModelError, ConfigError, OutputError and PassError.
    """
    from skipvision_export.graph.int4 import check_weights
    from skipvision_export.method.saved import saved_config

    out = Path(out)
    check_output(out, force)
    check_weights(weights, dtype, reference_weights)
    source = resolve_model(model, revision)
    config = config or saved_config(source.folder)
    if config is None:
        raise ConfigError(f"{model} carries no configuration of its own; give one, such as a preset")
    check_target(source, config, dtype, target)
    checkpoint = _check(source, dtype)
    if reference_weights:
        check_reference(checkpoint, dtype)
    check_room(checkpoint, dtype, out, reference_weights)
    traced = trace_skeleton(source, dtype, progress)
    progress("rewriting and writing")
    return traced.write(out, config, force, weights, reference_weights, target)


def _summary_weights(source: ModelSource) -> dict[str, Any]:
    """Weights of the summary tokens as arrays: the trained ones beside the model, else a plain mean."""
    from skipvision_export.method.saved import WEIGHTS_FILE, saved_summary
    from skipvision_export.method.summary import SummaryTokens

    hidden_size = source.family.decoder_dims(source.config).hidden_size
    summary = saved_summary(source.folder) or SummaryTokens(hidden_size)
    weights = {name: tensor.numpy() for name, tensor in summary.state_dict().items()}
    width = weights["ada.0.weight"].size
    if width != hidden_size:
        raise ModelError(
            f"{source.folder / WEIGHTS_FILE} is for a hidden size of {width}, the model has {hidden_size}"
        )
    return weights


def source_hash(source: ModelSource) -> str:
    """sha256 over config.json and the weights."""
    return SourceReader(source.folder).sha256
