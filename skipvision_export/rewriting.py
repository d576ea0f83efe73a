"""Skip-FFN and Skip-KV on a decoder that another program exported: an ONNX file in, an ONNX file out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from skipvision_export.bundle import atomic_file, check_output_file
from skipvision_export.config import SkipVisionConfig
from skipvision_export.errors import ConfigError, ModelError, OutputError, PassError
from skipvision_export.graph.passes.names import ffn_index_name

if TYPE_CHECKING:
    import onnx

    from skipvision_export.graph.others import FoundFFN

Progress = Callable[[str], None]


@dataclass(frozen=True)
class RewrittenDecoder:
    """What was found in a decoder and made of it.

    tiers: of each layer, see SkipFFNPass; skipped: visual tokens that skip the FFN, by tier, where a
    policy says. inputs: those that the caller gives beside the graph's own. kv_names: keys and values
    that are pruned. opset: the graph's. bytes: of what was written, 0 in a dry run.
    """

    ffns: tuple[FoundFFN, ...]
    tiers: tuple[int, ...]
    skipped: dict[int, int]
    inputs: tuple[str, ...]
    kv_names: tuple[str, ...]
    opset: int
    bytes: int


def rewrite_decoder(
    decoder: str | Path,
    out: str | Path,
    config: SkipVisionConfig | None = None,
    *,
    visual_tokens: int = 576,
    keep_kv: bool = False,
    decode: str | Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = lambda _: None,
) -> RewrittenDecoder:
    """Let a decoder skip the FFN, and drop keys and values, for tokens of the caller's choice.

    The graph at `out` takes, beside its own inputs,

    - `ffn_index` [M] int64, ascending: rows of the flattened [B*S] that go through the FFNs; with a policy
      an index for each tier, `ffn_index`, `ffn_index.2`, ..., the first with the fewest rows;
    - `kv_keep_index` [B, K] int64, ascending in each row: positions among all that are cached, past and
      new, whose keys and values `present.*` holds; not where `keep_kv` or no cache comes out;
    - `position_ids` [B, S] int64, where GroupQueryAttention counted cached tokens before.

    One graph serves prefill and decode: in decode the caller gives every row and every position, and
    `position_ids` go on from the prompt's length before pruning, `attention_mask` covers what is cached.
    decode: a second file, beside `out` and on the same weights, for decode alone: the graph as it was but
    for `position_ids`, so that no step copies the cache (benchmarks/others_cpu.py).
    Present and past must be buffers of their own: in one shared buffer (genai's
    past_present_share_buffer) pruned keys and values have no place of their own.

    config: a policy with a share for each layer (`visual_tokens` of an image turn shares into counts);
    by default every layer skips what the caller says. Weights in other files are copied to OUT_data, as
    they are. dry_run: prove all, write nothing.

    Raises ModelError for a file that is no ONNX graph or lacks its weights, PassError for a graph that
    cannot be rewritten, with the node's name, ConfigError for a policy that does not fit and OutputError.
    """
    from skipvision_export.graph.external import check_external, copy_external
    from skipvision_export.graph.others import OthersDecoder

    decoder, out = Path(decoder), Path(out)
    files = [out, out.with_name(f"{out.name}_data")]
    data = files[1].name
    if decode is not None:
        files.append(_beside(Path(decode), files, keep_kv))
    progress("reading the graph")
    proto = _read(decoder)
    check_external(proto, decoder.parent)
    _check_out(decoder, proto, files, force)
    found = OthersDecoder(proto, decoder.parent)
    tiers, skipped = _tiers(config, found.num_layers, visual_tokens)
    before = {value.name for value in found.model.graph.inputs}
    progress("rewriting")
    rewritten = found.rewrite(tiers, keep_kv)
    graphs = [rewritten] + ([found.decode()] if decode is not None else [])
    size = 0
    if not dry_run:
        progress("writing")
        with atomic_file(out, force) as scratch:
            size = copy_external(graphs, decoder.parent, scratch / data, data)
            if not size:
                (scratch / data).unlink()
            for graph, file in zip(graphs, [out, *files[2:]], strict=True):
                size += (scratch / file.name).write_bytes(graph.SerializeToString())
    inputs = tuple(value.name for value in rewritten.graph.input if value.name not in before)
    kv_names = () if keep_kv else tuple(found.kv_names)
    return RewrittenDecoder(tuple(found.ffns), tiers, skipped, inputs, kv_names, found.opset, size)


def _read(file: Path) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError

    if not file.is_file():
        raise ModelError(f"{file} is no file; expected an ONNX decoder, such as model.onnx")
    try:
        proto = onnx.load(str(file), load_external_data=False)
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from None
    except DecodeError:
        raise ModelError(f"{file} is no ONNX file") from None
    if not proto.graph.node:
        raise ModelError(f"{file} is no ONNX file, or its graph is empty")
    return proto


def _beside(decode: Path, files: Sequence[Path], keep_kv: bool) -> Path:
    """The file of the decode graph, checked."""
    if keep_kv:
        raise ConfigError(
            "a decode graph is for pruned keys and values; with --keep-kv the graph as it was decodes"
        )
    place, taken = decode.resolve(), [file.resolve() for file in files]
    if place.parent != taken[0].parent or place in taken:
        raise OutputError(f"{decode} must be another file in the folder of {files[0]}: they share weights")
    return decode


def _check_out(decoder: Path, proto: onnx.ModelProto, files: Sequence[Path], force: bool) -> None:
    """Nothing that belongs to the input may be written over."""
    from onnx.external_data_helper import ExternalDataInfo

    from skipvision_export.graph.external import external_tensors

    locations = {str(ExternalDataInfo(tensor).location) for tensor in external_tensors(proto)}
    own = {file.resolve() for file in (decoder, *(decoder.parent / place for place in locations))}
    for file in files:
        if file.resolve() in own:
            raise OutputError(f"{file} belongs to the graph that is read; choose another output file")
        check_output_file(file, force)


def _tiers(
    config: SkipVisionConfig | None, layers: int, visual_tokens: int
) -> tuple[tuple[int, ...], dict[int, int]]:
    """Tier of each layer, and how many visual tokens skip the FFN in each tier."""
    if config is None:
        return (1,) * layers, {}
    if config.is_dense:
        raise ConfigError("the policy skips nothing: there is nothing to rewrite")
    layout = config.layout(visual_tokens, num_layers=layers, tiled=config.tiled)
    tiers = tuple(layout.layer_tier(layer) for layer in range(layers))
    if not any(tiers):
        raise PassError("no layer of the policy skips its FFN: there is nothing to rewrite")
    return tiers, {tier: layout.total - sum(layout.ffn_mask(tier)) for tier in sorted({*tiers} - {0})}


def tier_input(tier: int) -> str:
    """Name of the input that a layer of a tier reads; "" for tier 0, which skips nothing."""
    return ffn_index_name(tier) if tier else ""
