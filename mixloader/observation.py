"""What a policy sees: the table of domains once, then an Observation a decision.

Arrays are float64 or int64 numpy, one entry a domain, always in the order of `DomainTable.names`.
Nothing here is absolute or tied to a number of domains; policies make of it what they need.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class DomainTable:
    """What is known of the domains before the first step.

    fields: "source" (what the model knows and should keep), "target" (what it should learn) or None.
    tokens: int64 [D], distinct training tokens of each domain.
    prior: float64 [D], sums to 1: the weights of step 0, to which a policy may fall back.
    """

    names: tuple[str, ...]
    fields: tuple[str | None, ...]
    groups: tuple[str | None, ...]
    tokens: np.ndarray
    prior: np.ndarray

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Signal:
    """Something measured: its latest value, what stands behind it and how old it is.

    value: float64, NaN where never measured.
    count: int64, tokens (or items) in the latest measurement, 0 where never measured.
    age:   int64, plan steps since the latest measurement, 0 if it is of this observation, -1 never.
    """

    value: np.ndarray
    count: np.ndarray
    age: np.ndarray


@dataclass(frozen=True)
class Observation:
    """The state of a run after plan step `step`, for the decision on `effect_step` and after.

    step, effect_step: plan steps (one plan step is one optimizer step).
    tokens: tokens trained on, up to and including `step`; tokens_since: since the last observation.
    progress: tokens / token budget in [0, 1], NaN where there is no budget.
    weights: float64 [D], the weights that `effect_step` has unless this decision changes them.
    seen: int64 [D], tokens read of each domain; epochs: float64 [D], passes over each domain.
    loss: Signal [D], mean negative log-likelihood a token (nats) of training batches since the last
        observation; loss_std: float64 [D], standard deviation over those tokens, NaN where unknown.
    feedback: what evaluations reported, by name ("source", "target", or a domain's name), each a
        Signal of shape []: a loss in nats a token, lower is better.
    influence: Signal [D, F] or None: how much reading each domain lowers the loss on each field, as the inner
        product of a mean row's gradient with the field's mean gradient; influence_std: float64 [D, F], its
        standard error; influence_fields: the names of the F fields.
    gram: Signal [D, D] or None: inner products of the mean row gradients of the domains, the diagonal corrected
        for the noise of the mean; row_norm_sq: float64 [D] or None, mean squared norm of one row's gradient.
    excess: Signal [D] or None: mean over tokens of max(0, loss - reference loss), nats.
    """

    step: int
    effect_step: int
    tokens: int
    tokens_since: int
    progress: float
    weights: np.ndarray
    seen: np.ndarray
    epochs: np.ndarray
    loss: Signal
    loss_std: np.ndarray
    feedback: dict[str, Signal] = field(default_factory=dict)
    influence: Signal | None = None
    influence_std: np.ndarray | None = None
    influence_fields: tuple[str, ...] = ()
    gram: Signal | None = None
    row_norm_sq: np.ndarray | None = None
    excess: Signal | None = None
