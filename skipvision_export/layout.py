"""The visual tokens of one image as the decoder sees them: roles in order, and what follows from them.

Source: Skip-Vision (arXiv 2503.21817), token roles.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
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


def policy_layout(
    visual_tokens: int, layer_shares: Sequence[float], kv_share: float, ranks: Sequence[int]
) -> TokenLayout:
    """The layout of a policy: shares of the visual tokens that skip each layer's FFN, and whose K/V go.

    ranks: by importance, of each token in the order in which they stand.
    """
    counts = [round(visual_tokens * share) for share in layer_shares]
    dropped = round(visual_tokens * kv_share)
    levels = sorted({n for n in (*counts, dropped) if n}, reverse=True)  # tier 1 has the most tokens

    def tier_of(count: int) -> int:
        return levels.index(count) + 1 if count else 0

    # A token has the highest tier whose layers let it skip; tokens are ranked by importance.
    tier_of_rank = [sum(rank >= visual_tokens - n for n in levels) for rank in range(visual_tokens)]
    grouped = [(tier, len(list(run))) for tier, run in groupby(tier_of_rank[rank] for rank in ranks)]
    layer_tiers = tuple(map(tier_of, counts))
    lowest = min(filter(None, layer_tiers), default=len(levels) + 1)

    def role(tier: int) -> Role:
        kept = not dropped or tier < tier_of(dropped)
        return "retained" if tier < lowest and kept else role_of(tier < lowest, kept)

    return TokenLayout(
        tuple((role(tier), n) for tier, n in grouped),
        tuple(tier for tier, _ in grouped),
        layer_tiers,
    )


def role_of(ffn: bool, kv: bool) -> Role:
    """Of a token of the skipped block that goes through FFNs, and whose K/V stay."""
    by_effect: dict[tuple[bool, bool], Role] = {
        (True, True): "passed",
        (False, False): "skipped",
        (True, False): "ffn_only",
        (False, True): "kv_only",
    }
    return by_effect[ffn, kv]


def runs_of(roles: Iterable[Role]) -> tuple[Run, ...]:
    """Roles in order, equal neighbours joined."""
    return tuple((role, len(list(run))) for role, run in groupby(roles))
