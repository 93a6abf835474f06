"""Offline learning on an invented task with a known answer: rows of good domains are worth something."""

import numpy as np
import pytest
import torch

from mixloader.agent.episodes import draw
from mixloader.agent.features import N_DOMAIN, N_GLOBAL
from mixloader.agent.network import SetNetwork
from mixloader.agent.offline.conservative import ConservativeQ
from mixloader.agent.offline.dataset import of_rollout
from mixloader.agent.offline.fit import learn, spread
from mixloader.agent.offline.learner import act, new_critic
from mixloader.agent.offline.learners import LEARNERS
from mixloader.agent.offline.proposals import ANYWHERE, NEAR_DATA, REACHABLE, move, propose
from mixloader.agent.offline.transitions import Transitions
from mixloader.agent.rollout import by_random_walk, play
from mixloader.agent.signals import draw_signals
from mixloader.agent.simulator import score
from mixloader.errors import ConfigError

STEPS, LIMIT = 12, 0.5


def invented(runs: int, seed: int, sizes=(2, 7), policy=None) -> Transitions:
    """Runs of a random walk (or a policy) over domains of which some are good: the first feature says so."""
    rng = np.random.default_rng(seed)
    parts = []
    for _ in range(runs):
        size = int(rng.integers(*sizes))
        domain = torch.zeros(STEPS, size, N_DOMAIN)
        good = torch.from_numpy((rng.permutation(size) < max(1, size // 2)).astype(np.float32))
        domain[..., 0] = good
        run = torch.zeros(STEPS, N_GLOBAL)
        run[:, 0] = torch.arange(STEPS) / STEPS
        mask = torch.ones(STEPS, size, dtype=torch.bool)
        prior = torch.full((STEPS, size), 1 / size)
        weights, actions = [prior[0]], []
        drift = torch.from_numpy(rng.normal(0, 1.0, size)).float()
        whole = Transitions(
            domain, run, prior, prior, mask, torch.full((STEPS,), LIMIT), prior, torch.zeros(STEPS), torch.zeros(STEPS)
        )
        for step in range(STEPS):
            states = whole.states(torch.tensor([step]))._replace(weights=weights[-1][None])
            drift = 0.8 * drift + torch.from_numpy(rng.normal(0, 0.6, size)).float()
            with torch.no_grad():
                action = move(states, torch.tanh(drift)) if policy is None else act(policy, states)
            actions.append(action[0])
            weights.append(action[0])
        action = torch.stack(actions)
        parts.append(
            Transitions(
                domain, run, torch.stack(weights[:-1]), prior, mask, whole.limit, action,
                (action * good).sum(1) / STEPS, torch.arange(STEPS - 1, -1, -1),
            )
        )  # fmt: skip
    return Transitions.join(parts)


def worth(policy, sizes=(2, 7), seed=99) -> float:
    data = invented(40, seed, sizes, policy)
    return float(np.mean([data.reward[list(run)].sum() for run in data.runs()]))


@pytest.fixture(scope="module")
def data():
    torch.set_num_threads(1)
    return invented(150, 0)


def new_actor() -> SetNetwork:
    torch.manual_seed(0)
    actor = SetNetwork()
    actor.low.fill_(-5)
    actor.high.fill_(5)
    return actor


def learnt(data, name, updates):
    return learn(data, new_actor(), name, updates, seed=0)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "updates", "ahead"), [("awr", 150, 0.15), ("iql", 200, 0.15), ("cql", 100, 0.15)])
def test_what_is_learnt_is_better_than_the_data_also_among_more_domains_than_there_were(data, name, updates, ahead):
    actor = learnt(data, name, updates)
    assert worth(actor) > worth(None) + ahead
    assert worth(actor, sizes=(12, 13)) > worth(None, sizes=(12, 13)) + ahead


def test_cloning_does_as_well_as_the_data(data):
    assert worth(learnt(data, "bc", 200)) == pytest.approx(worth(None), abs=0.08)


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNERS)
def test_the_same_seed_learns_the_same_bits(data, name):
    first, second = (learnt(data, name, 5).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_rewards_ahead_stop_at_the_end_of_a_run():
    data = invented(3, 1)
    for steps in (1, 5, STEPS, 100):
        sums, then = data.ahead(steps)
        for run in data.runs():
            for i in run:
                assert sums[i] == pytest.approx(data.reward[i : min(i + steps, run.stop)].sum().item(), abs=1e-6)
                assert then[i] == (i + steps if i + steps < run.stop else -1)
    assert torch.allclose(data.returns(), data.ahead(STEPS)[0])


def test_runs_are_joined_padded_and_chosen_without_a_change():
    few, many = invented(2, 2, sizes=(2, 3)), invented(1, 3, sizes=(6, 7))
    both = Transitions.join([few, many])
    assert [len(run) for run in both.runs()] == [STEPS] * 3
    assert both.mask.sum(1).unique().tolist() == [2, 6]
    last = both.where([2])
    assert torch.equal(last.action, many.action)
    assert torch.equal(last.reward, many.reward)
    states = both.states(torch.tensor([0, 1]))
    assert states.domain.shape == (2, 2, N_DOMAIN)
    assert torch.equal(states.weights, few.weights[:2])


def test_proposals_are_mixtures_and_the_reachable_ones_within_the_limit():
    data = invented(6, 4)
    index = torch.arange(0, len(data), 5)
    states, action = data.states(index), data.actions(index)
    found = propose(states, action, torch.Generator().manual_seed(0))
    assert found.shape == (REACHABLE + NEAR_DATA + ANYWHERE, *action.shape)
    assert torch.allclose(found.sum(-1), torch.ones(()))
    assert (found[:, ~states.mask] == 0).all()
    steps = torch.log(found[:REACHABLE]) - torch.log(states.weights)
    for d in range(2):  # relative to one another, log weights move by at most twice the limit
        assert ((steps[..., d] - steps[..., 0]).abs() <= 2 * LIMIT + 1e-5).all()


def test_the_conservative_term_is_the_log_of_a_mean_exponential_over_what_was_done():
    data = invented(4, 5)
    index = torch.arange(7)
    states, action = data.states(index), data.actions(index)
    others = propose(states, action, torch.Generator().manual_seed(1))
    critic = new_critic(data, 2)
    target = torch.linspace(-1, 1, 7)
    loss, excess = ConservativeQ.losses(critic, states, action, target, others)
    with torch.no_grad():
        own = critic(*states[:5], action).double()
        each = torch.stack([own, *[critic(*states[:5], other).double() for other in others]])
    assert loss.item() == pytest.approx(0.5 * ((own - target) ** 2).mean().item(), rel=1e-5)
    assert excess.item() == pytest.approx((each.exp().mean(0).log() - own).mean().item(), rel=1e-4)


@pytest.mark.slow
def test_more_conservatism_lowers_what_is_not_in_the_data(data):
    """Only relative to what is: the excess of a softmax over proposals falls as alpha rises."""

    def excess(alpha: float) -> float:
        learner = ConservativeQ(data.scaled(1 / spread(data)), new_actor(), 0, 60, alpha=alpha)
        return float(np.mean([learner.learn()["excess"] for _ in range(60)][-20:]))

    assert excess(1.0) < excess(0.0) - 0.3


def test_what_cannot_be_learnt_from_is_refused(data):
    with pytest.raises(ConfigError, match="expected one of bc, awr, iql, cql"):
        learn(data, new_actor(), "sac", 1, 0)
    with pytest.raises(ConfigError, match="fewer than two"):
        learn(data.where([0]), new_actor(), "bc", 1, 0)


@pytest.mark.slow
def test_simulated_runs_return_the_change_of_their_score():
    rng = np.random.default_rng(0)
    episodes = draw(4, rng)
    rollout = play(episodes, draw_signals(episodes, 6, rng), 6, by_random_walk(rng), rng)
    found = of_rollout(rollout)
    reached = score(episodes, rollout.history.held_out)
    for b, run in enumerate(found.runs()):
        assert found.reward[list(run)].sum().item() == pytest.approx(reached[b, -1] - reached[b, 1], abs=1e-5)
        size = episodes.size[b]
        np.testing.assert_allclose(found.action[list(run), :size], rollout.weights[b, 1:, :size], rtol=1e-6)
        assert int(found.mask[run[0]].sum()) == size
