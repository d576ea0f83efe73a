"""The visual tokens of one image as the decoder sees them: roles in order, and what follows from them.

Source: Skip-Vision (arXiv 2503.21817), token roles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["retained", "summary", "skipped", "ffn_only", "kv_only", "passed"]
Run = tuple[Role, int]

# role -> (goes through the FFNs, its keys and values outlive prefill)
ROLES: dict[str, tuple[bool, bool]] = {
    "retained": (True, True),
    "summary": (True, True),
    "skipped": (False, False),
    "ffn_only": (True, False),
    "kv_only": (False, True),
    "passed": (True, True),  # of the skipped block, but nothing is skipped: for ablations
}


@dataclass(frozen=True)
class TokenLayout:
    """The visual tokens of one image as the decoder sees them: runs of roles, in order.

    `runs` is such as `(("retained", 100), ("summary", 1), ("skipped", 156), ("summary", 1))`; see
    ROLES for what each role means.

    Where layers differ (a calibrated policy), `tiers` holds one number for each run and
    `layer_tiers` one for each decoder layer: a layer of tier t > 0 lets the runs of tier t and above
    skip its FFN, a layer of tier 0 skips nothing. Where they are empty, every layer has tier 1, and
    so have the runs whose role skips the FFN.
    """

    runs: tuple[Run, ...]
    tiers: tuple[int, ...] = ()
    layer_tiers: tuple[int, ...] = ()

    def count(self, *roles: Role) -> int:
        """Number of tokens of these roles."""
        return sum(n for r, n in self.runs if r in roles)

    @property
    def total(self) -> int:
        """Visual tokens in the decoder's sequence, summary tokens included."""
        return sum(n for _, n in self.runs)

    @property
    def retained(self) -> int:
        """Visual tokens that are left whole."""
        return self.count("retained")

    @property
    def summaries(self) -> int:
        """Summary tokens."""
        return self.count("summary")

    @property
    def skipped(self) -> int:
        """Visual tokens of the skipped block, whatever of it they skip."""
        return self.total - self.retained - self.summaries

    @property
    def kept_kv(self) -> int:
        """Visual tokens whose K/V outlive prefill."""
        return sum(n for role, n in self.runs if ROLES[role][1])

    def kv_mask(self) -> list[bool]:
        """One flag for each visual token, in layout order: True where its K/V outlive prefill."""
        return [ROLES[role][1] for role, n in self.runs for _ in range(n)]

    def run_tiers(self) -> tuple[int, ...]:
        """Tier of each run."""
        return self.tiers or tuple(int(not ROLES[role][0]) for role, _ in self.runs)

    def layer_tier(self, layer: int) -> int:
        """Tier of a decoder layer; 0 where every token goes through its FFN."""
        return self.layer_tiers[layer] if self.layer_tiers else 1

    def used_tiers(self) -> tuple[int, ...]:
        """Distinct tiers above 0 of the layers, ascending; each needs an index of rows of its own."""
        return tuple(sorted({t for t in self.layer_tiers if t > 0})) if self.layer_tiers else (1,)

    def ffn_mask(self, tier: int = 1) -> list[bool]:
        """One flag for each visual token: True where it goes through the FFN of a layer of `tier`."""
        flags = []
        for (_, n), own in zip(self.runs, self.run_tiers(), strict=True):
            flags += [tier == 0 or own < tier] * n
        return flags

    def ffn_tokens(self, layer: int) -> int:
        """Visual tokens that go through one layer's FFN."""
        return sum(self.ffn_mask(self.layer_tier(layer)))

    def selection_sizes(self) -> tuple[int, ...]:
        """Sizes of the groups into which a selector puts the patches, most important first.

        The last group may be smaller than what is left of the patches, which are then merged to it.
        """
        if not self.tiers:
            return (self.retained, self.skipped)
        sizes = [0] * (max(self.tiers) + 1)
        for (_, n), tier in zip(self.runs, self.tiers, strict=True):
            sizes[tier] += n
        return tuple(sizes)
