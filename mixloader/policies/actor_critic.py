"""AC-ODM: an actor and a critic learn in the run which mixture brings the domains' gradients together.

Ma et al., arXiv 2505.23878: deep deterministic policy gradients (DDPG) over mixtures. The state is the domains' losses,
their changes, the rows read of each and the progress; the action the weights a; the reward of domain k how well its
gradient agrees with the others' (`gradient.alignment_rewards`); the critic has one value Q_k a domain, with target
r_k + gamma Q'_k(s', actor'(s')). A warm-up follows ODM, which the actor imitates meanwhile.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mixloader.errors import StateError
from mixloader.observation import DomainTable, Observation
from mixloader.policies.bandits import OnlineDataMixing
from mixloader.policies.base import register
from mixloader.policies.gradient import alignment_rewards, measured_gram, standardised
from mixloader.policies.set_network import Adam, SetNetwork, from_text, to_text
from mixloader.policies.update import check_options, domain_numbers, moved, steps_since
from mixloader.signals import numbers_to_json

FEATURES = 4
"""Loss, its change, tokens read (each standardised over the domains, clamped to +-3), and progress."""


@register("acodm")
class ActorCritic:
    """AC-ODM's online learner, with networks over sets of domains and an actor that is trained.

    warmup_steps: plan steps that follow ODM: 833, as in the source. gamma 0.95, tau 1e-3 (of the target networks) a
        minibatch, batch 32, updates (minibatches a decision) 1: as there. hidden: width of the networks.
    learning_rate: of Adam, for both. memory: transitions kept; 256; there 10,000, but here they are saved.
    floor: part of the mixture shared out evenly, so that every domain goes on being measured.
    noise: standard deviation of what is added to the actor's logits to explore. seed: of the networks and of noise.

    Where it differs from the released code, and why. There the actor's optimiser is never stepped (both losses call
    the critic's), so the actor stays as it was initialised; here both are. There the actor's objective is the mean of
    the Q_k, but rewards are standardised over the domains, so their mean is zero whatever the action; here it is
    sum_k a_k Q_k, what the mixture earns. The networks are permutation-equivariant and small instead of five layers of
    1024 for one number of domains. Norms of the model's weights are not among the signals, so not in the state. The
    gram comes from sketches, over what was read since it was last measured, instead of from single batches.
    One transition is a decision, however many steps it covers: unlike other policies', its path depends on that.
    """

    needs = frozenset({"loss", "influence"})

    def __init__(
        self,
        warmup_steps: int = 833,
        gamma: float = 0.95,
        tau: float = 1e-3,
        batch: int = 32,
        updates: int = 1,
        hidden: int = 16,
        learning_rate: float = 1e-3,
        memory: int = 256,
        floor: float = 0.04,
        noise: float = 0.1,
        seed: int = 0,
    ):
        check_options(
            "acodm", warmup_steps=(warmup_steps, 0, math.inf), gamma=(gamma, 0, 1), tau=(tau, 0, 1),
            batch=(batch, 1, math.inf), updates=(updates, 1, math.inf), hidden=(hidden, 1, math.inf),
            learning_rate=(learning_rate, 0, math.inf), memory=(memory, 2, math.inf), floor=(floor, 0, 1),
            noise=(noise, 0, math.inf),
        )  # fmt: skip
        self.warmup_steps, self.gamma, self.tau, self.batch, self.updates = warmup_steps, gamma, tau, batch, updates
        self.hidden, self.learning_rate, self.memory, self.floor = hidden, learning_rate, memory, float(floor)
        self.noise, self.seed = float(noise), seed
        self._odm = OnlineDataMixing("code")

    def reset(self, domains: DomainTable) -> np.ndarray | None:
        """New networks, and nothing remembered; the run begins at the weights it has."""
        self.domains = domains
        self._odm.reset(domains)
        rng = np.random.default_rng(self.seed)
        self.actor, self.critic = (SetNetwork(FEATURES + extra, self.hidden, rng) for extra in (0, 1))
        rng = np.random.default_rng(self.seed)  # the targets begin as what they follow
        self._slow_actor, self._slow_critic = (SetNetwork(FEATURES + extra, self.hidden, rng) for extra in (0, 1))
        self._actor_adam = Adam(self.actor.parameters, self.learning_rate)
        self._critic_adam = Adam(self.critic.parameters, self.learning_rate)
        # float32 [t, K, FEATURES + 2]: state, action and reward of the latest decisions; a row's next state is the
        # next row's. The reward of the last is not known yet.
        self._past = np.empty((0, len(domains), FEATURES + 2), dtype=np.float32)
        self._losses = np.full(len(domains), math.nan)
        self._decisions = 0
        return None

    def decide(self, observation: Observation) -> np.ndarray | None:
        """The actor's mixture, or ODM's while warming up; None while nothing was read."""
        gram, measured = measured_gram(observation)
        imitated = self._odm.decide(observation)
        active = (observation.weights > 0) & (observation.loss.age >= 0)
        if steps_since(observation) <= 0 or np.count_nonzero(active) < 2:
            return None
        self._decisions += 1
        self._reward(gram, measured & active)
        state = self._state(observation, active)
        warming = observation.effect_step < self.warmup_steps
        rng = np.random.default_rng([self.seed, self._decisions])
        if warming and imitated is not None:
            weights = imitated
        else:
            logits, _ = self.actor.forward(state[None])
            explored = logits[0] + self.noise * self._by_name(rng.standard_normal(len(active)))
            shares = _softmax(explored[active].astype(np.float64)[None])[0]
            weights = moved(
                observation.weights, active, (1 - self.floor) * shares + self.floor / np.count_nonzero(active)
            )
        action = np.where(active, weights / weights[active].sum(), 0.0)
        row = np.concatenate([state, action[:, None], np.zeros_like(state[:, :1])], axis=1).astype(np.float32)
        self._past = np.concatenate([self._past[-self.memory + 1 :], row[None]])
        for _ in range(self.updates if len(self._past) > 2 else 0):
            self._train(self._past[:-1], self._past[1:], warming, rng)
        return weights

    def _by_name(self, values: np.ndarray) -> np.ndarray:
        """One number a domain, dealt out by the order of the names, so not a matter of the domains' order."""
        out = np.empty_like(values)
        out[sorted(range(len(values)), key=self.domains.names.__getitem__)] = values
        return out

    def _reward(self, gram: np.ndarray, measured: np.ndarray) -> None:
        """What the last decision earned, by the gradients measured since."""
        if len(self._past) and np.count_nonzero(measured) > 1:
            self._past[-1, :, -1] = 0.0
            self._past[-1, measured, -1] = alignment_rewards(gram[np.ix_(measured, measured)])

    def _state(self, observation: Observation, active: np.ndarray) -> np.ndarray:
        """float32 [K, FEATURES]; zeros for domains that are not active."""
        state = np.zeros((len(active), FEATURES))
        losses = observation.loss.value
        state[active, 0] = standardised(losses[active])
        changed = active & np.isfinite(self._losses)
        state[changed, 1] = standardised(losses[changed] - self._losses[changed])
        state[active, 2] = standardised(np.where(observation.loss.age == 0, observation.loss.count, 0)[active])
        state[active, 3] = observation.progress if math.isfinite(observation.progress) else 0.5
        self._losses = losses.copy()
        return state.astype(np.float32)

    def _train(self, now: np.ndarray, then: np.ndarray, warming: bool, rng: np.random.Generator) -> None:
        """One minibatch for the critic, and one for the actor: imitation while warming up, then sum_k a_k Q_k."""
        chosen = rng.integers(0, len(now), self.batch)
        state, action, reward = now[chosen, :, :FEATURES], now[chosen, :, -2], now[chosen, :, -1]
        known = (action > 0).astype(np.float32)
        n_domains = np.maximum(known.sum(axis=1, keepdims=True), 1)
        next_state = then[chosen, :, :FEATURES]
        next_logits, _ = self._slow_actor.forward(next_state)
        next_value, _ = self._slow_critic.forward(_with(next_state, _softmax(next_logits, known), n_domains))
        value, inputs = self.critic.forward(_with(state, action, n_domains))
        error = (value - reward - np.float32(self.gamma) * next_value) * known
        self._critic_adam.step(self.critic.backward(inputs, 2 * error / error.size)[0])

        logits, actor_inputs = self.actor.forward(state)
        own = _softmax(logits, known)
        if warming:
            d_own = 2 * n_domains * (own - action) / self.batch
        else:
            value, inputs = self.critic.forward(_with(state, own, n_domains))
            through = self.critic.backward(inputs, own)[1][..., -1] * n_domains
            d_own = -(value + through) / self.batch
        d_logits = own * (d_own - (own * d_own).sum(axis=1, keepdims=True))
        self._actor_adam.step(self.actor.backward(actor_inputs, d_logits)[0])
        self._slow_actor.follow(self.actor, self.tau)
        self._slow_critic.follow(self.critic, self.tau)

    # State

    def _arrays(self) -> list[np.ndarray]:
        networks = (self.actor, self.critic, self._slow_actor, self._slow_critic)
        adams = (self._actor_adam, self._critic_adam)
        parameters = [p for network in networks for p in network.parameters]
        return parameters + [m for adam in adams for moments in (adam.mean, adam.square) for m in moments]

    def state_dict(self) -> dict[str, Any]:
        """Networks, optimisers and memory, the arrays as base64: exact, and far larger than other policies'."""
        return {
            "arrays": [to_text(array) for array in self._arrays()],
            "adam_steps": [self._actor_adam.steps, self._critic_adam.steps],
            "past": to_text(self._past),
            "losses": numbers_to_json(self._losses),
            "decisions": self._decisions,
            "odm": self._odm.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises StateError for a state of another number of domains or width."""
        self._losses = domain_numbers(state["losses"], len(self.domains), "acodm")
        own = self._arrays()
        try:
            saved = [from_text(text, array.shape) for text, array in zip(state["arrays"], own, strict=True)]
        except ValueError as error:
            raise StateError(f"the state of policy 'acodm' is of another width than hidden={self.hidden}") from error
        for array, values in zip(own, saved, strict=True):
            array[...] = values
        self._actor_adam.steps, self._critic_adam.steps = state["adam_steps"]
        self._past = from_text(state["past"], (-1, *self._past.shape[1:]))
        self._decisions = state["decisions"]
        self._odm.load_state_dict(state["odm"])


def _softmax(logits: np.ndarray, known: np.ndarray | None = None) -> np.ndarray:
    """Over the last axis; 0 where known is 0."""
    exp = np.exp(logits - logits.max(axis=-1, keepdims=True))
    exp = exp if known is None else exp * known + np.float32(1e-30)
    return exp / exp.sum(axis=-1, keepdims=True)


def _with(state: np.ndarray, action: np.ndarray, n_domains: np.ndarray) -> np.ndarray:
    """State and action, float32 [B, K, FEATURES + 1]; a weight counts in even shares, so it is near 1 for any K."""
    return np.concatenate([state, (action * n_domains)[..., None]], axis=-1)
