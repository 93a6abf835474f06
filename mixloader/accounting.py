"""What each domain was asked to give and gave, to the token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mixloader.mixture import WEIGHT_ONE

if TYPE_CHECKING:
    from mixloader.loader import MixLoader


@dataclass(frozen=True)
class DomainAccount:
    """The account of one domain, over all ranks, up to the last step that is over.

    tokens: read by training (skipped ones are not). requested, achieved: shares of all tokens that the weights
    asked for, and that were read; where a domain has run out, what its weight was redistributed to.
    epochs: how often its windows were used up, skipped ones included. unique_left: tokens of the
    first epoch that were not read or skipped yet.
    """

    tokens: int
    requested: float
    achieved: float
    epochs: float
    unique_left: int


def accounts(loader: MixLoader) -> dict[str, DomainAccount]:
    """The account of each domain, by name."""
    state = loader.state_dict()
    seq_len = loader.seq_len
    read = [before + cursor * seq_len for before, cursor in zip(state["tokens_before"], state["cursors"], strict=True)]
    # A residual is quota minus count, so what was asked for needs no history.
    asked = [
        tokens + residual * seq_len / WEIGHT_ONE for tokens, residual in zip(read, state["residuals"], strict=True)
    ]
    total = max(1, sum(read))
    return {
        name: DomainAccount(
            tokens=tokens,
            requested=wanted / total,
            achieved=tokens / total,
            epochs=cursor / windows,
            unique_left=max(0, windows - cursor) * seq_len,
        )
        for name, tokens, wanted, cursor, windows in zip(
            loader.names, read, asked, state["cursors"], loader.windows.tolist(), strict=True
        )
    }
