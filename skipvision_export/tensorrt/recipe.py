"""Recipes: what to build for a target, as a TOML file. engines/README.md documents every field."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from skipvision_export.bundle import StrictModel
from skipvision_export.errors import ConfigError
from skipvision_export.tensorrt.library import Product


def _ascending(sizes: tuple[int, int, int]) -> tuple[int, int, int]:
    low, opt, high = sizes
    if not 0 <= low <= opt <= high:
        raise ValueError(f"[min, opt, max] must ascend from 0, got {list(sizes)}")
    return sizes


Range = Annotated[tuple[int, int, int], AfterValidator(_ascending)]


class BuilderSettings(StrictModel):
    """The compiler and its options. version: the oldest that may build, such as "10.14"."""

    product: Product | None = None
    version: Annotated[str, Field(pattern=r"^\d+(\.\d+){0,2}$")] | None = None
    optimization_level: int = Field(default=3, ge=0, le=5)
    workspace_mib: int | None = Field(default=None, ge=1)
    tf32: bool = False
    version_compatible: bool = False
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"] = "none"
    timing_cache: bool = True


class PluginSettings(StrictModel):
    """Whether KVPrune becomes a plugin layer.

    "auto": where --plugin names a library; "library": it must; "declared": without one, for a library
    that is there when the engine runs; "none": the function body is compiled instead.
    """

    kv_prune: Literal["auto", "library", "declared", "none"] = "auto"
    serialize: bool = False


class ProfileSettings(StrictModel):
    """One optimization profile, in [min, opt, max]; what is None follows from the bundle."""

    batch: Range = (1, 1, 1)
    text: Range = (1, 64, 512)
    new_tokens: int = Field(default=256, ge=1)
    images: Range | None = None
    prompt: Range | None = None
    kept: Range | None = None
    cache: Range | None = None


class Recipe(StrictModel):
    """A target's recipe; `load` reads one."""

    name: str = ""
    description: str = ""
    precision: tuple[Literal["float32", "float16", "bfloat16"], ...] = ("float16", "bfloat16", "float32")
    builder: BuilderSettings = BuilderSettings()
    plugin: PluginSettings = PluginSettings()
    profiles: tuple[ProfileSettings, ...] = Field(default=(ProfileSettings(),), min_length=1)

    @classmethod
    def load(cls, file: Path) -> Recipe:
        """Read a TOML file; raises ConfigError that names the file and the field."""
        try:
            data = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"recipe {file} cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"recipe {file} is no TOML: {error}") from None
        try:
            recipe = cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            what = first["msg"].removeprefix("Value error, ")
            if first["type"] == "extra_forbidden":
                part = _at(cls, first["loc"][:-1])
                what = f"unknown field; expected one of {', '.join(part.model_fields)}"
            raise ConfigError(f"recipe {file}: {where}: {what}") from None
        return recipe.model_copy(update={"name": recipe.name or file.stem})


def _at(model: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel]:
    """The table that a path of an error stands in."""
    tables: dict[int | str, type[BaseModel]] = {
        "builder": BuilderSettings,
        "plugin": PluginSettings,
        "profiles": ProfileSettings,
    }
    return next((tables[step] for step in path if step in tables), model)
