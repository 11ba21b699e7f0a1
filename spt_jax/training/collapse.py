"""The alarm for a retriever that has settled on one prompt."""

from __future__ import annotations

from collections.abc import Mapping

USAGE = "development/usage/"
COLLAPSED = 0.95
"""A prompt that answers so large a share of the turns leaves nothing for the others."""


class CollapseAlarm:
    """Says once that selection has collapsed, and again only after it had recovered."""

    def __init__(self) -> None:
        self._sounded = False

    def sentence(self, figures: Mapping[str, float]) -> str:
        """What to tell of an evaluation's figures; empty where there is nothing, or nothing new, to tell.

        Args:
            figures: Some under ``development/usage/k``, the share of turns that select prompt k.
        """
        shares = {name.removeprefix(USAGE): share for name, share in figures.items() if name.startswith(USAGE)}
        most = max(shares, key=lambda k: shares[k], default="")
        collapsed = len(shares) > 1 and shares[most] >= COLLAPSED
        known, self._sounded = self._sounded, collapsed
        if known or not collapsed:
            return ""
        return (
            f"prompt {most} answers {shares[most]:.0%} of the development turns, so the retriever hardly uses the "
            f"other {len(shares) - 1}; objective.balance_weight keeps them in use"
        )
