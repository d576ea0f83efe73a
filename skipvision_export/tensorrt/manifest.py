"""`engines.json`: what a folder of engines is and what is in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from skipvision_export.bundle import sha256_of
from skipvision_export.errors import BundleError

ENGINES = "engines.json"
SCHEMA_VERSION = 1


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EngineTensor(_Strict):
    """An input or output; dynamic dimensions are -1."""

    name: str
    dtype: str
    shape: list[int]


class EngineInfo(_Strict):
    """One engine. profiles: for each, the [min, opt, max] shape of each input; seconds: of the build."""

    file: str
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


class BundleRef(_Strict):
    """The bundle that engines were built from; the hash is that of its manifest, which has all others."""

    name: str
    sha256: str
    preset: str
    dtype: str


class EnginesManifest(_Strict):
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
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BundleError(f"{file} is truncated or no JSON ({error}); build again") from None
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            raise BundleError(
                f"{file} has schema version {version}, this version reads {SCHEMA_VERSION}; build again"
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise BundleError(f"{file} is altered: {where}: {first['msg']}; build again") from None

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
