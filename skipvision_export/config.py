"""Which visual tokens are retained, which are skipped, and in which order they stand.

The only place that computes token counts. Source: Skip-Vision (arXiv 2503.21817), token roles.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from skipvision_export.errors import ConfigError

Role = Literal["retained", "summary", "skipped"]
Run = tuple[Role, int]


@dataclass(frozen=True)
class TokenLayout:
    """The visual tokens of one image as the decoder sees them: runs of roles, in order.

    `runs` is such as `(("retained", 100), ("skipped", 156))`; roles other than "skipped" go
    through every FFN and keep their keys and values.
    """

    runs: tuple[Run, ...]

    def count(self, role: Role) -> int:
        """Number of tokens of one role."""
        return sum(n for r, n in self.runs if r == role)

    @property
    def total(self) -> int:
        """Visual tokens in the decoder's sequence."""
        return sum(n for _, n in self.runs)

    @property
    def kept(self) -> int:
        """Visual tokens that go through the FFN and whose K/V outlive prefill."""
        return self.total - self.count("skipped")

    def skipped_mask(self) -> list[bool]:
        """One flag for each visual token, in layout order: True where it is skipped."""
        return [role == "skipped" for role, n in self.runs for _ in range(n)]


@dataclass(frozen=True)
class SkipVisionConfig:
    """How to treat the visual tokens of one image; JSON round trip by `to_json`/`from_json`.

    Give `retained` and `skipped` (numbers of tokens), or `skip_share` (a share in [0, 1) that fits
    any model). `visual_tokens`, where set, is the only number of visual tokens the preset is for.
    `merged` tokens are what `retained + skipped` leaves of them.
    """

    name: str = "custom"
    retained: int | None = None
    skipped: int | None = None
    skip_share: float | None = None
    visual_tokens: int | None = None
    selector: str = "cls_attention"
    summaries: bool = False

    def __post_init__(self) -> None:
        """Refuse counts that contradict each other."""
        if self.skip_share is None:
            if self.retained is None or self.skipped is None:
                raise ConfigError(
                    f"preset {self.name!r} needs both retained and skipped counts, or a skip_share"
                )
            if self.retained < 0 or self.skipped < 0 or self.retained + self.skipped == 0:
                raise ConfigError(
                    f"retained={self.retained} and skipped={self.skipped} must be at least 0 and not both 0"
                )
        elif self.retained is not None or self.skipped is not None:
            raise ConfigError("give either retained and skipped counts or a skip_share, not both")
        elif not 0 <= self.skip_share < 1:
            raise ConfigError(f"skip_share={self.skip_share} is outside [0, 1)")

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
    def counts(cls, retained: int, skipped: int) -> SkipVisionConfig:
        """A configuration by numbers of tokens."""
        return cls(name=f"{retained}-{skipped}", retained=retained, skipped=skipped)

    @property
    def is_dense(self) -> bool:
        """True where nothing is skipped."""
        return self.skip_share == 0 or self.skipped == 0

    def layout(self, visual_tokens: int) -> TokenLayout:
        """Resolve the counts for a model with `visual_tokens` tokens for each image.

        Raises ConfigError where the configuration does not fit that number.
        """
        if self.visual_tokens is not None and self.visual_tokens != visual_tokens:
            raise ConfigError(
                f"preset {self.name!r} is for {self.visual_tokens} visual tokens for each image, this "
                f"model has {visual_tokens}; use --retained N --skipped N, or a preset by share such "
                "as skip-50"
            )
        if self.skip_share is not None:
            # round() and not int(): int(100 * (1 - 0.9)) is 9.
            skipped = round(visual_tokens * self.skip_share)
            retained = visual_tokens - skipped
        else:
            assert self.retained is not None and self.skipped is not None  # by __post_init__
            retained, skipped = self.retained, self.skipped
        if retained + skipped > visual_tokens:
            raise ConfigError(
                f"retained {retained} + skipped {skipped} tokens are more than the model's "
                f"{visual_tokens} visual tokens"
            )
        if retained + skipped < visual_tokens:
            raise ConfigError(
                f"retained {retained} + skipped {skipped} tokens leave {visual_tokens - retained - skipped} "
                f"of the model's {visual_tokens} visual tokens to be merged away, which is not supported "
                "yet; let the two add up"
            )
        if self.summaries:
            raise ConfigError(f"preset {self.name!r} needs summary tokens, not supported yet")
        runs: tuple[Run, ...] = (("retained", retained), ("skipped", skipped))
        return TokenLayout(tuple(run for run in runs if run[1]))

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any] | str) -> SkipVisionConfig:
        """Inverse of `to_json`; raises ConfigError on unknown fields."""
        values = json.loads(data) if isinstance(data, str) else dict(data)
        unknown = sorted(values.keys() - {field.name for field in fields(cls)})
        if unknown:
            raise ConfigError(f"unknown configuration fields {', '.join(unknown)}")
        return cls(**values)

    def renamed(self, name: str) -> SkipVisionConfig:
        """The same configuration under another name."""
        return replace(self, name=name)


def _presets(configs: Sequence[SkipVisionConfig]) -> dict[str, SkipVisionConfig]:
    return {config.name: config for config in configs}


# Shares fit any model; the rest are the paper's, with its names and its 576 visual tokens.
PRESETS = _presets(
    [
        SkipVisionConfig("skip-50", skip_share=0.5),
        SkipVisionConfig("skip-75", skip_share=0.75),
        SkipVisionConfig("skip-90", skip_share=0.9),
        SkipVisionConfig("llava-100-156", 100, 156, visual_tokens=576, summaries=True),
        SkipVisionConfig("llava-256-320", 256, 320, visual_tokens=576, summaries=True),
        SkipVisionConfig("llava-64-156", 64, 156, visual_tokens=576, summaries=True),
    ]
)
