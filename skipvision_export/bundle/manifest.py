"""`skipvision.json`: what a bundle is and what is in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from skipvision_export.config import SkipVisionConfig
from skipvision_export.errors import BundleError
from skipvision_export.layout import TokenLayout

MANIFEST = "skipvision.json"
SCHEMA_VERSION = 1


class StrictModel(BaseModel):
    """Frozen, and without fields that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class VersionedModel(StrictModel):
    """What a JSON file holds that says its own schema version.

    digest: sha256 of the file as it is with an empty digest: the hashes of all other files stand in it, and
    so do numbers that no hash covers.
    """

    digest: str = ""

    def write(self, file: Path) -> Self:
        """Write it as JSON; returns it with its digest."""
        text = seal(self.model_dump(mode="json"))
        file.write_text(text, encoding="utf-8")
        return self.model_copy(update={"digest": json.loads(text)["digest"]})

    @classmethod
    def read(cls, file: Path, schema_version: int, again: str) -> Self:
        """Read `file`, which must be of `schema_version`.

        again: how the user gets a new one, such as "export again". Raises BundleError with the file's
        name for what is truncated, of another version, or altered.
        """
        try:
            text = file.read_text(encoding="utf-8")
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{file} is truncated or no JSON ({error}); {again}") from None
        except OSError as error:
            raise BundleError(f"{file} cannot be read: {error.strerror}") from None
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != schema_version:
            raise BundleError(
                f"{file} has schema version {version}, this version reads {schema_version}; {again}"
            )
        try:
            read = cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise BundleError(f"{file} is altered: {where}: {first['msg']}; {again}") from None
        if len(read.digest) != 64 or _digest(text.replace(_field(read.digest), _field(""), 1)) != read.digest:
            raise BundleError(f"{file} is altered: its sha256 is not its digest; {again}")
        return read


def seal(data: dict[str, Any]) -> str:
    """The text of a manifest with these fields and its digest."""
    text = json.dumps({"digest": ""} | data | {"digest": ""}, indent=1, ensure_ascii=False) + "\n"
    return text.replace(_field(""), _field(_digest(text)), 1)


def _field(digest: str) -> str:
    return f'"digest": "{digest}"'


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _inside(name: str) -> str:
    """A path that stays in its folder."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise ValueError(f"{name!r} is no path inside the bundle")
    return name


InsidePath = Annotated[str, AfterValidator(_inside)]


class TensorInfo(StrictModel):
    """One input or output of a graph; dynamic dimensions by name."""

    name: str
    dtype: str
    shape: list[int | str]


class GraphInfo(StrictModel):
    """One ONNX file of the bundle."""

    file: InsidePath
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]


class FileInfo(StrictModel):
    """Size in bytes and hash of one file."""

    bytes: int
    sha256: str


class SourceInfo(StrictModel):
    """The model that was exported; the hash covers its configuration and weights."""

    name: str
    family: str
    architecture: str
    sha256: str


class Roles(StrictModel):
    """Visual tokens of one image; see TokenLayout, whose runs, tiers and layer_tiers these are."""

    retained: int
    skipped: int
    summaries: int = 0
    layout: list[tuple[str, int]]
    tiers: list[int] = Field(default_factory=list)
    layer_tiers: list[int] = Field(default_factory=list)


class ModelInfo(StrictModel):
    """Sizes that runtimes and benchmarks need without opening a graph.

    visual_tokens are those of one crop where an image is `tiled`, a thumbnail and tiles. max_positions: of
    a sequence, generated tokens included; no graph may be given a position beyond.

    merge_size: set where a picture keeps its shape: patches along each side of a visual token. Then
    visual_tokens and roles are those of one square picture, the configuration tells them for any other
    (`SkipVisionConfig.layout`), and positions have three axes. deepstack: decoder layers behind which
    further features are added.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    visual_tokens: int
    image_token_id: int
    tiled: bool = False
    max_positions: int | None = None
    merge_size: int | None = None
    deepstack: int = 0


class PromptInfo(StrictModel):
    """The chat template rendered around a question: `before`, the question, `after`.

    One of the two holds the picture's placeholder. strips: the template strips the question first.
    """

    before: str
    after: str
    strips: bool = False


class Manifest(VersionedModel):
    """The whole manifest; `load` checks its schema version first.

    variants: other forms of a graph: `GRAPH.RUNTIME` gives what the graph gives, for one runtime (those
    for genai: the features of all pictures as one matrix); `decoder_prefill.append` is prefill that takes
    the cache of the turns before, as decode does.
    dtype: of the arithmetic, and of the weights unless `weights` says that the decoder's matrices have
    less bits.
    prompt: for runtimes without Jinja; absent where there is no template, or it does more than put
    text around a question.
    referenced: files of the bundle that are hard links to the model's, and their names there; their size
    and hash are in `files`.
    """

    schema_version: int = SCHEMA_VERSION
    source: SourceInfo
    preset: str
    config: dict[str, Any]
    roles: Roles
    model: ModelInfo
    prompt: PromptInfo | None = None
    dtype: str
    weights: Literal["int4"] | None = None
    opset: int
    graphs: dict[str, GraphInfo]
    variants: dict[str, GraphInfo] = Field(default_factory=dict)
    tools: dict[str, str]
    files: dict[InsidePath, FileInfo] = Field(default_factory=dict)
    referenced: dict[InsidePath, str] = Field(default_factory=dict)

    @property
    def layout(self) -> TokenLayout:
        """One image's visual tokens as the decoder sees them."""
        roles = self.roles
        runs = tuple((role, n) for role, n in roles.layout)
        return TokenLayout(runs, tuple(roles.tiers), tuple(roles.layer_tiers))  # type: ignore[arg-type]

    @property
    def skip_config(self) -> SkipVisionConfig:
        """The configuration that the bundle was exported with."""
        return SkipVisionConfig.from_json(self.config)

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read a bundle's manifest; raises BundleError with the file's name."""
        file = folder / MANIFEST
        if not folder.is_dir():
            raise BundleError(f"{folder} is not a folder; expected a bundle that export wrote")
        if not file.is_file():
            raise BundleError(f"{folder} is no bundle: it has no {MANIFEST}")
        return cls.read(file, SCHEMA_VERSION, "export again")

    @property
    def own_bytes(self) -> int:
        """Bytes of the bundle's files but for those that are the model's."""
        return sum(info.bytes for name, info in self.files.items() if name not in self.referenced)

    def verify(self, folder: Path) -> None:
        """Check that every file is there, whole, unaltered and inside; raises BundleError naming it."""
        for graph in (*self.graphs.values(), *self.variants.values()):
            if graph.file not in self.files:
                raise BundleError(f"{folder / graph.file} has no hash in {MANIFEST}; export again")
        root = folder.resolve()
        for name, info in self.files.items():
            file, again = folder / name, "export again"
            if not file.resolve().is_relative_to(root):
                raise BundleError(f"{file} is a link to a file outside of the bundle; export again")
            if name in self.referenced:
                again = (
                    f"it is the model's own {self.referenced[name]} (--reference-weights), which was changed "
                    "after the export; export again"
                )
            if not file.is_file():
                raise BundleError(f"{file} is missing from the bundle; export again")
            size = file.stat().st_size
            if size != info.bytes:
                kind = "truncated" if size < info.bytes else "altered"
                raise BundleError(f"{file} is {kind}: {size} bytes, the manifest says {info.bytes}; {again}")
            if sha256_of(file) != info.sha256:
                raise BundleError(f"{file} is altered: its sha256 is not the manifest's; {again}")


def sha256_of(*files: Path) -> str:
    """Hash of the files' contents, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def file_table(folder: Path, known: Mapping[str, FileInfo] | None = None) -> dict[str, FileInfo]:
    """Size and hash of every file under `folder` but the manifest; those `known` are not read again."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    names = {file.relative_to(folder).as_posix(): file for file in files}
    return {
        name: (known or {}).get(name) or FileInfo(bytes=file.stat().st_size, sha256=sha256_of(file))
        for name, file in names.items()
    }
