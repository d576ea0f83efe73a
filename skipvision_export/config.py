"""Which visual tokens are retained, merged and skipped, in which order they stand, and in which layers.

The only place that computes token counts. Source: Skip-Vision (arXiv 2503.21817), token roles,
"choosing and merging".
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from skipvision_export.errors import ConfigError
from skipvision_export.layout import Role, TokenLayout, policy_layout, role_of, runs_of
from skipvision_export.tokens import merge_names, selector, selector_names

PassThrough = Literal["none", "last", "first_last"]
POLICY_KIND, POLICY_VERSION = "skipvision-policy", 1  # of the files that `skipvision calibrate` writes


@dataclass(frozen=True)
class SkipVisionConfig:
    """How to treat the visual tokens of one image; JSON round trip by `to_json`/`from_json`.

    Numbers of tokens are given in one of three ways:
      - `retained` and `skipped`: counts; what they leave of the model's visual tokens is merged away
      - `skip_share` (and `retained_share`): shares of the model's visual tokens, for any model; without
        `retained_share` nothing is merged
      - `layer_shares`: a policy, one share of skipped tokens for each decoder layer

    visual_tokens: where set, the only number of visual tokens the preset is for
    selector, merge: names in `skipvision_export.tokens`; seed: of the random selector
    order: "grouped" (the method's layout), or "raster" (tokens stay where they are; only for
        selectors that do not look at the picture)
    summaries: add a summary token behind the retained and one behind the skipped block
    pass_through: skipped tokens that go through the FFN all the same, the authors' "pass last"
    strict: text after an image does not see its skipped tokens, in training and prefill as well
    skip_ffn, skip_kv: the two halves of the method; False is for ablations
    kv_share: of a policy: share of the visual tokens whose K/V are dropped after prefill
    tiled: the image comes as a thumbnail and tiles (LLaVA-NeXT); all tiles' tokens are merged
    most_retained: with shares: retained tokens of an image at most; those over it are merged where a preset
        merges, else skipped
    """

    name: str = "custom"
    retained: int | None = None
    skipped: int | None = None
    skip_share: float | None = None
    visual_tokens: int | None = None
    selector: str = "cls_attention"
    summaries: bool = False
    retained_share: float | None = None
    layer_shares: tuple[float, ...] | None = None
    merge: str = "bipartite"
    order: Literal["grouped", "raster"] = "grouped"
    pass_through: PassThrough = "none"
    strict: bool = False
    skip_ffn: bool = True
    skip_kv: bool = True
    tiled: bool = False
    seed: int = 0
    kv_share: float = 0.0
    most_retained: int | None = None

    def __post_init__(self) -> None:
        """Refuse what contradicts itself; raises ConfigError."""
        if self.layer_shares is not None:
            object.__setattr__(self, "layer_shares", tuple(float(s) for s in self.layer_shares))
        self._check_numbers()
        self._check_choices()

    def _check_numbers(self) -> None:
        ways = [self.retained is not None or self.skipped is not None, self.skip_share is not None]
        ways.append(self.layer_shares is not None)
        if sum(ways) != 1:
            if sum(ways) == 0:
                raise ConfigError(
                    f"preset {self.name!r} needs both retained and skipped counts, or a skip_share"
                )
            raise ConfigError("give retained and skipped counts, a skip_share or layer_shares, not both")
        if ways[0]:
            if self.retained is None or self.skipped is None:
                raise ConfigError(
                    f"preset {self.name!r} needs both retained and skipped counts, or a skip_share"
                )
            if self.retained < 0 or self.skipped < 0 or self.retained + self.skipped == 0:
                raise ConfigError(
                    f"retained={self.retained} and skipped={self.skipped} must be at least 0 and not both 0"
                )
        if not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"seed={self.seed} is not in [0, 2^63)")
        for label, share, top in (
            ("skip_share", self.skip_share, self.skip_share != 1),
            ("retained_share", self.retained_share, True),
            ("kv_share", self.kv_share, True),
            *(("layer_shares", share, True) for share in self.layer_shares or ()),
        ):
            if share is not None and not (0 <= share <= 1 and top):
                raise ConfigError(f"{label}={share} is outside [0, 1)")
        if self.retained_share is not None and (
            self.skip_share is None or self.retained_share + self.skip_share > 1
        ):
            raise ConfigError("retained_share needs a skip_share, and the two must not exceed 1")
        if self.most_retained is not None and (self.skip_share is None or self.most_retained < 1):
            raise ConfigError(
                f"most_retained={self.most_retained} needs a preset by share and must be at least 1"
            )

    def _check_choices(self) -> None:
        for label, value, allowed in (
            ("selector", self.selector, selector_names()),
            ("merge", self.merge, merge_names()),
            ("order", self.order, ("grouped", "raster")),
            ("pass_through", self.pass_through, ("none", "last", "first_last")),
        ):
            if value not in allowed:
                raise ConfigError(f"{label} {value!r} is not one of {', '.join(allowed)}")
        by_layer = self.layer_shares is not None
        if self.kv_share and not by_layer:
            raise ConfigError("kv_share belongs to a policy with layer_shares; presets use skip_kv")
        if by_layer and (self.summaries or self.strict or self.tiled or self.pass_through != "none"):
            raise ConfigError(
                "a policy with layer_shares takes no summaries, no pass_through, no strict masking and "
                "no tiles: these are for models that were trained with them"
            )
        if self.order == "raster":
            if not selector(self.selector).static:
                raise ConfigError(
                    f"order 'raster' needs a selector that does not look at the picture, not "
                    f"{self.selector!r}"
                )
            if self.summaries or self.merges_some or self.tiled:
                raise ConfigError("order 'raster' takes no summaries, no merging and no tiles")
        if self.strict and not self.skip_kv:
            raise ConfigError("strict masking needs skip_kv: decode would see the skipped tokens again")
        if self.tiled and self.retained is None:
            raise ConfigError("a tiled preset needs retained and skipped counts")

    @classmethod
    def preset(cls, name: str) -> SkipVisionConfig:
        """A preset by its name; raises ConfigError with the names there are."""
        try:
            return PRESETS[name]
        except KeyError:
            raise ConfigError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}") from None

    @classmethod
    def dense(cls) -> SkipVisionConfig:
        """Every visual token retained: the model as it is."""
        return cls(name="dense", skip_share=0.0)

    @classmethod
    def counts(cls, retained: int, skipped: int, **options: Any) -> SkipVisionConfig:
        """A configuration by numbers of tokens."""
        return cls(name=f"{retained}-{skipped}", retained=retained, skipped=skipped, **options)

    @property
    def is_dense(self) -> bool:
        """True where the model is left as it is."""
        if self.layer_shares is not None:
            return not any(self.layer_shares) and not self.kv_share
        if self.most_retained is not None:
            return False
        nothing = self.skip_share == 0 if self.skip_share is not None else self.skipped == 0
        return nothing and not self.summaries and self.visual_tokens is None and not self.merges_some

    @property
    def merges_some(self) -> bool:
        """True where shares leave a part of the tokens to be merged; counts tell with the model only."""
        return self.retained_share is not None

    def layout(
        self,
        visual_tokens: int,
        *,
        num_layers: int | None = None,
        tiled: bool = False,
        varies: bool = False,
    ) -> TokenLayout:
        """Resolve the counts for a model.

        visual_tokens: of each image, or of each crop where the model tiles its images. varies: whether
        it is only that of one image. Raises ConfigError where the configuration does not fit.
        """
        if varies:
            self._check_varying()
        self._check_fit(visual_tokens, num_layers, tiled)
        if self.layer_shares is not None:
            ranks: Sequence[int] = range(visual_tokens)
            if self.order == "raster":
                ranks = _static_ranks(self.selector, self.seed, visual_tokens)
            return policy_layout(visual_tokens, self.layer_shares, self.kv_share, ranks)
        retained, skipped = self._counts(visual_tokens)
        if varies and self.summaries and not (retained and skipped):
            raise ConfigError(
                f"preset {self.name!r} leaves {retained} retained and {skipped} skipped tokens of a picture "
                f"with {visual_tokens} visual tokens, a summary needs one of each; give a larger picture"
            )
        bypass = role_of(not self.skip_ffn, not self.skip_kv)
        through = role_of(True, not self.skip_kv)
        if self.order == "raster":
            ranks = _static_ranks(self.selector, self.seed, visual_tokens)
            return TokenLayout(runs_of("retained" if rank < retained else bypass for rank in ranks))
        block: list[Role] = [bypass] * skipped
        if block and self.pass_through != "none":
            block[-1] = through
            if self.pass_through == "first_last":
                block[0] = through
        summary: list[Role] = ["summary"] if self.summaries else []
        return TokenLayout(
            runs_of(["retained"] * retained)
            + runs_of(summary if retained else [])
            + runs_of(block)
            + runs_of(summary if skipped else [])
        )

    def _check_varying(self) -> None:
        if self.layer_shares is not None:
            raise ConfigError(
                f"policy {self.name!r} is for one number of visual tokens, this model has more or less of "
                "them for each picture; use a preset by share such as skip-50"
            )
        if self.skip_share is None:
            raise ConfigError(
                f"preset {self.name!r} is for fixed numbers of visual tokens, this model has more or less of "
                "them for each picture; use a preset by share such as skip-50, with --most-retained N for a "
                "limit"
            )

    def _check_fit(self, visual_tokens: int, num_layers: int | None, tiled: bool) -> None:
        if self.visual_tokens is not None and self.visual_tokens != visual_tokens:
            if self.layer_shares is not None:
                raise ConfigError(
                    f"policy {self.name!r} is for {self.visual_tokens} visual tokens for each image, this "
                    f"model has {visual_tokens}; calibrate this model"
                )
            raise ConfigError(
                f"preset {self.name!r} is for {self.visual_tokens} visual tokens for each image, this "
                f"model has {visual_tokens}; use --retained N --skipped N, or a preset by share such "
                "as skip-50"
            )
        if self.tiled != tiled:
            kinds = {True: "a thumbnail and tiles", False: "one crop for each image"}
            counts = f"--retained {visual_tokens} --skipped N"
            raise ConfigError(
                f"preset {self.name!r} is for models with {kinds[self.tiled]}, this model has "
                f"{kinds[tiled]}; use {counts if tiled else 'a preset by share'}"
            )
        layers = self.layer_shares
        if layers is not None and num_layers is not None and len(layers) != num_layers:
            raise ConfigError(
                f"policy {self.name!r} is for a decoder of {len(layers)} layers, this model has "
                f"{num_layers}; calibrate this model"
            )

    def _counts(self, visual_tokens: int) -> tuple[int, int]:
        """Retained and skipped tokens of one image, after merging."""
        if self.skip_share is not None:
            # round() and not int(): int(100 * (1 - 0.9)) is 9.
            skipped = round(visual_tokens * self.skip_share)
            retained = visual_tokens - skipped
            if self.retained_share is not None:
                # Both rounded up may be one too many.
                retained = min(retained, round(visual_tokens * self.retained_share))
            if self.most_retained is not None:
                retained = min(retained, self.most_retained)
                if self.retained_share is None:
                    skipped = visual_tokens - retained
        else:
            assert self.retained is not None and self.skipped is not None  # by __post_init__
            retained, skipped = self.retained, self.skipped
        if self.tiled:
            if retained != visual_tokens or not 0 < skipped <= visual_tokens:
                raise ConfigError(
                    f"a tiled preset retains the thumbnail's {visual_tokens} tokens and merges the tiles' "
                    f"to 1 to {visual_tokens}, not retained={retained}, skipped={skipped}"
                )
        elif retained + skipped > visual_tokens:
            raise ConfigError(
                f"retained {retained} + skipped {skipped} tokens are more than the model's "
                f"{visual_tokens} visual tokens"
            )
        elif skipped == 0 and retained < visual_tokens:
            raise ConfigError(
                f"retained {retained} and skipped 0 leave {visual_tokens - retained} of the "
                f"model's {visual_tokens} visual tokens with nothing to be merged to; skip at least 1"
            )
        return retained, skipped

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        values = asdict(self)
        if self.layer_shares is not None:
            values["layer_shares"] = list(self.layer_shares)
        return values

    @classmethod
    def from_json(cls, data: dict[str, Any] | str) -> SkipVisionConfig:
        """Inverse of `to_json`; raises ConfigError on unknown fields and on types that do not fit."""
        from pydantic import TypeAdapter, ValidationError

        try:
            values = json.loads(data) if isinstance(data, str) else dict(data)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"no readable JSON: {error}") from None
        unknown = sorted(values.keys() - {field.name for field in fields(cls)})
        if unknown:
            raise ConfigError(f"unknown configuration fields {', '.join(unknown)}")
        try:
            # As JSON: there arrays are what tuples are written as, and nothing else is converted.
            return TypeAdapter(cls).validate_json(json.dumps(values), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ConfigError(f"configuration field {where} is of a wrong type: {first['msg']}") from None

    @classmethod
    def load(cls, file: str | Path) -> SkipVisionConfig:
        """Read a configuration or policy file; raises ConfigError that names it."""
        file = Path(file)
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{file} is no readable configuration: {error}") from None
        if not isinstance(data, dict):
            raise ConfigError(f"{file} is no configuration: expected a JSON object")
        try:
            if data.keys() & {"kind", "version"}:
                _check_policy(data)
            return cls.from_json(data.get("config", data))
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None

    def renamed(self, name: str) -> SkipVisionConfig:
        """The same configuration under another name."""
        return replace(self, name=name)


def _check_policy(data: dict[str, Any]) -> None:
    kind, version = data.get("kind"), data.get("version")
    if kind != POLICY_KIND:
        raise ConfigError(f"its kind is {kind!r}, expected {POLICY_KIND!r}, as `skipvision calibrate` writes")
    if version != POLICY_VERSION:
        raise ConfigError(
            f"a policy of version {version!r}, this program reads {POLICY_VERSION}; calibrate again"
        )
    config = data.get("config")
    if not isinstance(config, dict) or config.get("layer_shares") is None:
        raise ConfigError("a policy without config.layer_shares; calibrate again")


def _static_ranks(name: str, seed: int, visual_tokens: int) -> list[int]:
    """Rank by importance of each position, for a selector that does not look at the picture."""
    scores = selector(name).static_scores(visual_tokens, seed)
    order = (-scores).argsort(kind="stable")
    ranks = [0] * visual_tokens
    for rank, position in enumerate(order.tolist()):
        ranks[position] = rank
    return ranks


def _presets() -> dict[str, SkipVisionConfig]:
    """Shares fit any model; the rest are the paper's, with its names and its 576 visual tokens."""
    papers = [
        SkipVisionConfig("llava-100-156", 100, 156, visual_tokens=576, summaries=True),
        SkipVisionConfig("llava-256-320", 256, 320, visual_tokens=576, summaries=True),
        SkipVisionConfig("llava-64-156", 64, 156, visual_tokens=576, summaries=True),
        SkipVisionConfig(
            "llava-hd-576-576",
            576,
            576,
            visual_tokens=576,
            summaries=True,
            selector="thumbnail",
            tiled=True,
        ),
    ]
    variants = [
        replace(preset, name=f"{preset.name}-pass-{how.replace('_', '-')}", pass_through=how)
        for preset in papers
        for how in ("last", "first_last")
    ]
    configs = [
        SkipVisionConfig("skip-50", skip_share=0.5),
        SkipVisionConfig("skip-75", skip_share=0.75),
        SkipVisionConfig("skip-90", skip_share=0.9),
        # Retains the share that llava-100-156 does, for any number of visual tokens; merging the rest to as
        # few leaves about a quarter of the visual FLOPs also where the FFN is narrow.
        SkipVisionConfig("quarter", skip_share=0.16, retained_share=0.17, summaries=True),
        *papers,
        *variants,
    ]
    return {config.name: config for config in configs}


PRESETS = _presets()
