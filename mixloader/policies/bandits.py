"""Bandits: each domain is an arm, its reward something of its loss, and some of the mixture always explores.

Rewards and estimates are float64 [D], nats a token where they are losses. An arm is pulled when its domain was read
since the last decision; the estimate of one that was not stays. K counts the domains with a weight.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

from mixloader.errors import ConfigError
from mixloader.observation import DomainTable, Observation
from mixloader.policies.base import register
from mixloader.policies.update import check_options, domain_numbers, latest_losses, moved, steps_since
from mixloader.signals import numbers_to_json


def _read(observation: Observation) -> np.ndarray:
    """bool [D]: the domains read since the last observation."""
    return (observation.loss.age == 0) & (observation.loss.count > 0)


@register("exp3")
class Exp3:
    """EXP3 (Auer et al., 2002) as IBM's fms-acceleration-odm runs it: p = (1 - gamma) w / sum w + gamma / K.

    log w_k grows by eta (r_k / p_k) / K at each update, with p_k the weight in force, for the arms that were pulled.
    eta 0.3, gamma 0.1: as there. update_steps: plan steps of one update; there the user's evaluation interval.
    reward: "loss", the training loss (its train_loss); or "gain", how far that loss fell since the domain was last
        read. IBM divides the rewards of all arms by their probabilities, also of those not pulled, and lets w grow
        without bound; here w is kept as a logarithm whose largest is 0.
    """

    needs = frozenset({"loss"})

    def __init__(
        self,
        eta: float = 0.3,
        gamma: float = 0.1,
        reward: Literal["loss", "gain"] = "loss",
        update_steps: float = 100,
    ):
        check_options("exp3", eta=(eta, 0, math.inf), gamma=(gamma, 0, 1), update_steps=(update_steps, 1e-9, 1e18))
        if reward not in ("loss", "gain"):
            raise ConfigError(f"policy 'exp3' has no reward {reward!r}; expected 'loss' or 'gain'")
        self.eta, self.gamma, self.reward, self.update_steps = float(eta), float(gamma), reward, float(update_steps)

    def reset(self, domains: DomainTable) -> np.ndarray | None:
        """Forget all rewards; the run begins at the weights it has, and the first decision takes them as log w."""
        self._log_arms = np.full(len(domains), math.nan)
        self._last_loss = np.full(len(domains), math.nan)
        return None

    def decide(self, observation: Observation) -> np.ndarray | None:
        active, pulled = observation.weights > 0, _read(observation)
        n_domains = np.count_nonzero(active)
        updates = steps_since(observation) / self.update_steps
        if n_domains < 2 or updates <= 0:
            return None
        weights = np.where(active, observation.weights, 1.0)
        arms = np.where(np.isnan(self._log_arms), np.log(weights), self._log_arms)
        loss = observation.loss.value
        rewards = loss if self.reward == "loss" else self._last_loss - loss
        self._last_loss = np.where(pulled, loss, self._last_loss)
        pulled = pulled & active & np.isfinite(rewards)
        arms = arms + np.where(pulled, self.eta * updates * rewards / weights / n_domains, 0.0)
        self._log_arms = np.where(active, arms - arms[active].max(), math.nan)
        shares = np.exp(self._log_arms[active])
        mixed = (1 - self.gamma) * shares / shares.sum() + self.gamma / n_domains
        return _measured_only(observation, active, mixed)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able and exact."""
        return {"log_arms": numbers_to_json(self._log_arms), "last_loss": numbers_to_json(self._last_loss)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises StateError for a state of another number of domains."""
        n_domains = len(self._log_arms)
        self._log_arms = domain_numbers(state["log_arms"], n_domains, "exp3")
        self._last_loss = domain_numbers(state["last_loss"], n_domains, "exp3")


def _measured_only(observation: Observation, active: np.ndarray, mixed: np.ndarray) -> np.ndarray | None:
    """float64 [D]: the mixture of the active domains, except that those never measured keep the weight they have."""
    shares = np.zeros(len(active))
    shares[active] = mixed
    part = active & (observation.loss.age >= 0)
    if np.count_nonzero(part) < 2:
        return None
    return moved(observation.weights, part, shares[part])


def exploration(step: int, n_domains: int) -> float:
    """ODM's rate of exploration after plan step `step`: min(1 / K, sqrt(ln K / (K (step + 1)))); 1 / K before."""
    if step < 0:
        return 1.0 / n_domains
    return min(1.0 / n_domains, math.sqrt(math.log(n_domains) / (n_domains * (step + 1))))


@register("odm")
class OnlineDataMixing:
    """ODM (Albalak et al., arXiv 2312.02406, algorithm 1): more of the domains with a high training loss.

    form "paper": R_k <- alpha R_k + (1 - alpha) L_k / p_k for the domains read, and
        p_k = (1 - K e_t) exp(e_{t-1} R_k) / sum_j exp(e_{t-1} R_j) + e_t, with e_t as in `exploration`.
    form "code", what its release does: R_k <- alpha R_k + (1 - alpha) exp(L_k), and
        p_k = (1 - K e_t) R_k / sum_j R_j + e_t: linear in R, and without the division by p_k.
    alpha: 0.9 an optimizer step, to the power of the steps that a decision covers. p_k is the weight in force, which
    is `lag` decisions newer than the one that the rows were drawn with.
    """

    needs = frozenset({"loss"})

    def __init__(self, form: Literal["paper", "code"] = "paper", alpha: float = 0.9):
        check_options("odm", alpha=(alpha, 0, 1))
        if form not in ("paper", "code"):
            raise ConfigError(f"policy 'odm' has no form {form!r}; expected 'paper' or 'code'")
        self.form, self.alpha = form, float(alpha)

    def reset(self, domains: DomainTable) -> np.ndarray | None:
        """Forget all rewards; the run begins at the weights it has."""
        self._rewards = np.zeros(len(domains))
        return None

    def decide(self, observation: Observation) -> np.ndarray | None:
        active = observation.weights > 0
        n_domains, steps = int(np.count_nonzero(active)), steps_since(observation)
        if n_domains < 2 or steps <= 0:
            return None
        pulled = _read(observation) & active
        loss = np.where(pulled, observation.loss.value, 0.0)
        reward = np.exp(loss) if self.form == "code" else loss / np.where(active, observation.weights, 1.0)
        kept = self.alpha**steps
        self._rewards = np.where(pulled, kept * self._rewards + (1 - kept) * reward, self._rewards)
        estimate = self._rewards[active]
        if self.form == "paper":
            logits = exploration(observation.step - 1, n_domains) * estimate
            estimate = np.exp(logits - logits.max())
        if not estimate.sum() > 0:
            return None
        even = exploration(observation.step, n_domains)
        return _measured_only(observation, active, (1 - n_domains * even) * estimate / estimate.sum() + even)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able and exact."""
        return {"rewards": numbers_to_json(self._rewards)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises StateError for a state of another number of domains."""
        self._rewards = domain_numbers(state["rewards"], len(self._rewards), "odm")


@register("dynamixsft")
class DynamixSFT:
    """DynamixSFT (arXiv 2508.12116): p_k is proportional to p0_k exp(beta Q_k), raised to gamma / K.

    Q_k: moving average of rewards (L_pre - L_post) / (L_pre + e), scaled from 0 to 1 over the domains. p0: the prior.
    The paper looks one step ahead: it takes a step on a batch of each domain, measures that batch before and after,
    and takes the step back, at 12.7 % of the time. Here the step looked ahead to is the one that the run takes anyway:
    L_pre and L_post are two successive losses of the domain, held-out ones where evaluations report them by its name.
    It costs nothing, but credits a domain with what it learned from others.
    beta, gamma, alpha (kept of Q an update) and update_steps are not known to us from the paper.
    """

    needs = frozenset({"loss"})

    def __init__(self, beta: float = 2.0, gamma: float = 0.1, alpha: float = 0.9, update_steps: float = 10):
        check_options(
            "dynamixsft", beta=(beta, 0, math.inf), gamma=(gamma, 0, 1), alpha=(alpha, 0, 1),
            update_steps=(update_steps, 1e-9, 1e18),
        )  # fmt: skip
        self.beta, self.gamma, self.alpha, self.update_steps = float(beta), float(gamma), float(alpha), update_steps

    def reset(self, domains: DomainTable) -> np.ndarray | None:
        """Forget all rewards; the run begins at the weights it has."""
        self.domains = domains
        self._last_loss = np.full(len(domains), math.nan)
        self._quality = np.zeros(len(domains))
        return None

    def decide(self, observation: Observation) -> np.ndarray | None:
        losses = latest_losses(observation, self.domains.names)
        active = (observation.weights > 0) & (self.domains.prior > 0)
        # A loss that did not change is an old one: no look-ahead came of it.
        known = active & np.isfinite(self._last_loss) & np.isfinite(losses) & (losses != self._last_loss)
        if np.count_nonzero(known) > 1:
            before = self._last_loss[known]
            gain = (before - losses[known]) / (before + 1e-8)
            reward = (gain - gain.min()) / (gain.max() - gain.min()) if gain.max() > gain.min() else 0.0 * gain
            kept = self.alpha ** (steps_since(observation) / self.update_steps)
            self._quality[known] = kept * self._quality[known] + (1 - kept) * reward
        self._last_loss = np.where(np.isfinite(losses), losses, self._last_loss)
        n_domains = np.count_nonzero(active)
        if n_domains < 2:
            return None
        mixed = self.domains.prior[active] * np.exp(self.beta * self._quality[active])
        return _measured_only(observation, active, np.maximum(mixed / mixed.sum(), self.gamma / n_domains))

    def state_dict(self) -> dict[str, Any]:
        """JSON-able and exact."""
        return {"last_loss": numbers_to_json(self._last_loss), "quality": numbers_to_json(self._quality)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises StateError for a state of another number of domains."""
        n_domains = len(self.domains)
        self._last_loss = domain_numbers(state["last_loss"], n_domains, "dynamixsft")
        self._quality = domain_numbers(state["quality"], n_domains, "dynamixsft")
