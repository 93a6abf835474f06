"""From the observations of a run, in order, to the agent's features: for the policy, and for fitting to real runs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from mixloader.agent.action import bound
from mixloader.agent.features import N_DOMAIN, N_GLOBAL, field_codes, make_features
from mixloader.agent.memory import Measured, State, new_state, update_state
from mixloader.errors import StateError
from mixloader.observation import DomainTable, Observation
from mixloader.policies.set_network import from_text, to_text

_COLUMNS = {"source": 0, "target": 1}
_LARGEST = 1e100  # of an influence; products of gradients in float32 are below 1e77
_NEVER = -2  # what is told before the first step is told after step -1


class Features(NamedTuple):
    """What the agent sees at each of T decisions of a run on D domains.

    domain: float32 [T, D, P]; run: float32 [T, G]; active: bool [T, D], domains that can be traded, others are 0
    everywhere; weights, prior: float64 [T, D], sums of 1 over the active ones; limit: float64 [T], bounds of the
    decisions (action.bound); tokens, budget: float64 [T], read so far and of the run, as far as was known.
    """

    domain: np.ndarray
    run: np.ndarray
    active: np.ndarray
    weights: np.ndarray
    prior: np.ndarray
    limit: np.ndarray
    tokens: np.ndarray
    budget: np.ndarray


def features_of(
    domains: DomainTable,
    observations: Iterable[Observation],
    preference: float,
    model_size: float | None = None,
    *,
    influence: bool = True,
    feedback: bool = True,
) -> Features:
    """The features of a whole run, for fitting. influence, feedback: False leaves that signal out."""
    maker = FeatureMaker(influence, feedback)
    maker.reset(domains, preference, model_size)
    rows = []
    for observation in observations:
        domain, run = maker.see(observation)
        weights, prior = np.zeros((2, len(domains)))
        if maker.active.sum() > 1:
            weights[maker.active], prior[maker.active] = maker.weights, maker.prior
        when = float(observation.tokens), maker.budget
        rows.append((domain, run, maker.active, weights, prior, maker.limit, *when))
    return Features(*(np.array(column) for column in zip(*rows, strict=True)))


class FeatureMaker:
    """Remembers what the observations of one run said, and makes features of it.

    influence, feedback: False ignores that signal, as if it were not there.
    After `see`: active, bool [D], the domains that can be traded; weights and prior, float64 [A], of those, sums of 1;
    share, what they have together of the mixture; budget, tokens of the run as far as is known; limit, the bound of
    this decision (action.bound).
    """

    def __init__(self, influence: bool = True, feedback: bool = True):
        self.influence, self.feedback = influence, feedback

    def reset(self, domains: DomainTable, preference: float, model_size: float | None = None) -> None:
        """Begin a run. model_size: number of parameters of the model, None if it is not known."""
        self.preference, self.log_size = preference, math.nan if model_size is None else math.log10(model_size)
        self._take(domains)
        self.state = new_state(len(domains))
        self._told = np.full(len(domains) + 2, _NEVER, dtype=np.int64)

    def extend(self, domains: DomainTable) -> None:
        """Go on with a table that has more domains at its end: what was seen of the others stays."""
        more = len(domains) - len(self.table)
        fresh = new_state(more)
        losses, influence, feedback = self.state
        n_domains = len(self.table)
        self.state = State(
            np.concatenate([losses, fresh.losses], axis=1),
            np.concatenate([influence, fresh.influence], axis=2),
            np.concatenate([feedback[:, :n_domains], fresh.feedback[:, :more], feedback[:, n_domains:]], axis=1),
        )
        self._told = np.insert(self._told, n_domains, np.full(more, _NEVER))
        self._take(domains)

    def _take(self, domains: DomainTable) -> None:
        self.table = domains
        self._fields = field_codes(domains.fields)
        self._tokens = np.array(domains.tokens, dtype=np.int64)
        self._prior = np.array(domains.prior, dtype=np.float64)
        self._index = {name: d for d, name in enumerate((*domains.names, "source", "target"))}

    def see(self, observation: Observation) -> tuple[np.ndarray, np.ndarray]:
        """Features of the domains, float32 [D, P], and of the run, [G], after taking in the observation.

        Something must have been read since the last one (tokens_since > 0). Domains that are not active have 0
        everywhere, and all do if fewer than two are.
        """
        # Without a budget the run is always half done: bounds and horizons then scale with its length so far.
        progress = min(observation.progress, 1.0) if observation.progress > 0 else math.nan
        budget = observation.tokens / (0.5 if math.isnan(progress) else progress)
        since = float(observation.tokens_since)
        self.budget, self.limit = budget, bound(since, budget)
        update_state(self.state, self._measured(observation), since, budget)
        self.active = (observation.weights > 0) & (self._prior > 0)
        if self.active.all() and len(self.active) > 1:
            return self._features(self.active, observation, progress, budget)
        domain, run = np.zeros((len(self.active), N_DOMAIN), dtype=np.float32), np.zeros(N_GLOBAL, dtype=np.float32)
        if self.active.sum() > 1:
            domain[self.active], run = self._features(self.active, observation, progress, budget)
        return domain, run

    def _features(
        self, active: np.ndarray, observation: Observation, progress: float, budget: float
    ) -> tuple[np.ndarray, np.ndarray]:
        told = np.append(active, [True, True])
        parts = zip(self.state, (active, active, told), strict=True)
        state = State(*(np.ascontiguousarray(part[..., of]) for part, of in parts))
        weights, prior = observation.weights[active], self._prior[active]
        # Exact sums are not a matter of the domains' order.
        self.share = math.fsum(weights)
        self.weights, self.prior = weights / self.share, prior / math.fsum(prior)
        return make_features(
            state, self.weights, self.prior, self._tokens[active], observation.seen[active],
            observation.epochs[active], self._fields[active], progress, self.preference, float(observation.tokens),
            budget, self.log_size,
        )  # fmt: skip

    def _measured(self, observation: Observation) -> Measured:
        loss = observation.loss
        fresh = (loss.age == 0) & (loss.count > 0)
        influence, influence_std, influence_age = self._influence(observation)
        return Measured(
            np.where(fresh, loss.value, math.nan),
            np.where(fresh, observation.loss_std, math.nan),
            np.where(fresh, loss.count, 0),
            influence,
            influence_std,
            influence_age,
            self._feedback(observation),
        )

    def _influence(self, observation: Observation) -> np.ndarray:
        """float64 [3, D, 2]: value, standard error and age in tokens, NaN where not measured."""
        out = np.full((3, len(self.table), 2), math.nan)
        signal = observation.influence
        if signal is None or not self.influence:
            return out
        step_tokens = observation.tokens / (observation.step + 1)
        for column, name in enumerate(observation.influence_fields):
            if name in _COLUMNS:
                known = signal.age[:, column] >= 0
                out[0, :, _COLUMNS[name]] = np.where(known, signal.value[:, column], math.nan)
                if observation.influence_std is not None:
                    # The spread over few rows is too small by this, and that over one row says nothing.
                    rows = signal.count[:, column]
                    factor = np.where(rows > 1, rows / np.maximum(rows - 1, 1), math.nan)
                    out[1, :, _COLUMNS[name]] = observation.influence_std[:, column] * np.sqrt(factor)
                out[2, :, _COLUMNS[name]] = signal.age[:, column] * step_tokens
        # Squares and quotients of what is beyond would overflow: what is too large is not known, too small is nothing.
        size = np.abs(out[:2])
        out[:2] = np.where(size < 1 / _LARGEST, 0.0, np.where(size <= _LARGEST, out[:2], math.nan))
        return out

    def _feedback(self, observation: Observation) -> np.ndarray:
        """float64 [D + 2]: what was told since the last observation, of domains, source and target."""
        out = np.full(len(self._told), math.nan)
        if not self.feedback:
            return out
        for name, signal in observation.feedback.items():
            column, reported = self._index.get(name), observation.step - int(signal.age)
            if column is not None and reported > self._told[column]:
                out[column] = float(signal.value)
                self._told[column] = reported
        return out

    def state_dict(self) -> dict[str, Any]:
        """JSON-able and exact: 11 numbers a domain, and 15 more where influence and feedback came."""
        parts = self.state._asdict()
        ages = {"influence": self.state.influence[2], "feedback": self.state.feedback[4]}
        return {
            **{
                name: None if name in ages and np.isinf(ages[name]).all() else to_text(part, "<f8")
                for name, part in parts.items()
            },
            "told": None if (self._told == _NEVER).all() else self._told.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises StateError for a state of another number of domains."""
        fresh = new_state(len(self.table))
        try:
            self.state = State(
                *(
                    part if state[name] is None else from_text(state[name], part.shape, "<f8")
                    for name, part in fresh._asdict().items()
                )
            )
        except (KeyError, ValueError) as error:
            raise StateError(
                f"the agent's state does not fit this run of {len(self.table)} domains ({error}); resume with the "
                "manifest that the state was saved with"
            ) from error
        told = state["told"]
        self._told = (
            np.full(len(self._told), _NEVER, dtype=np.int64) if told is None else np.array(told, dtype=np.int64)
        )
