"""`engines.json`: what a folder of engines is and what is in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from skipvision_export.bundle import InsidePath, StrictModel, VersionedModel, sha256_of
from skipvision_export.errors import BundleError

ENGINES = "engines.json"
SCHEMA_VERSION = 1


class EngineTensor(StrictModel):
    """An input or output; dynamic dimensions are -1."""

    name: str
    dtype: str
    shape: list[int]


class EngineInfo(StrictModel):
    """One engine. profiles: for each, the [min, opt, max] shape of each input; seconds: of the build."""

    file: InsidePath
    bytes: int
    sha256: str
    seconds: float
    builder: str
    builder_version: str
    layers: int
    plugin_layers: int
    inputs: list[EngineTensor]
    outputs: list[EngineTensor]
    profiles: list[dict[str, list[list[int]]]]


class BundleRef(StrictModel):
    """The bundle that engines were built from; the hash is that of its manifest, which has all others."""

    name: str
    sha256: str
    preset: str
    dtype: str


class EnginesManifest(VersionedModel):
    """The whole manifest. route: how the compiler was found; recipe: as it was read."""

    schema_version: int = SCHEMA_VERSION
    bundle: BundleRef
    route: Literal["tensorrt", "tensorrt_rtx", "trt-rtx"]
    platform: str
    kv_prune: Literal["library", "declared", "function"]
    recipe: dict[str, Any]
    engines: dict[str, EngineInfo]

    @classmethod
    def load(cls, folder: Path) -> EnginesManifest:
        """Read a folder's manifest; raises BundleError with the file's name."""
        file = folder / ENGINES
        if not file.is_file():
            raise BundleError(f"{folder} holds no engines: it has no {ENGINES}; run `skipvision build`")
        return cls.read(file, SCHEMA_VERSION, "build again")

    def verify(self, folder: Path) -> None:
        """Check that every engine is there and unaltered; raises BundleError naming it."""
        for info in self.engines.values():
            file = folder / info.file
            if not file.is_file():
                raise BundleError(f"{file} is missing; build again")
            if file.stat().st_size != info.bytes or sha256_of(file) != info.sha256:
                raise BundleError(
                    f"{file} is truncated or altered: its sha256 is not the manifest's; build again"
                )
