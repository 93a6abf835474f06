"""Offline learning on an invented task with a known answer: rows of good domains are worth something."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mixloader.agent.episodes import draw
from mixloader.agent.features import N_DOMAIN, N_GLOBAL, OF_SIGNALS
from mixloader.agent.network import SetNetwork, feature_columns
from mixloader.agent.networks import Network
from mixloader.agent.offline.cloning import BehaviourCloning
from mixloader.agent.offline.conservative import ConservativeQ
from mixloader.agent.offline.dataset import of_rollout
from mixloader.agent.offline.fit import learn, spread
from mixloader.agent.offline.learner import BATCH, QUIET, TOGETHER, act, moves, new_critic
from mixloader.agent.offline.learners import LEARNERS
from mixloader.agent.offline.proposals import ANYWHERE, NEAR_DATA, REACHABLE, move, propose
from mixloader.agent.offline.transitions import Transitions
from mixloader.agent.rollout import by_random_walk, play
from mixloader.agent.signals import draw_signals
from mixloader.agent.simulator import score
from mixloader.agent.transformer import History, HistoryNetwork
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
        left, tokens = torch.arange(STEPS - 1, -1, -1), torch.arange(1.0, STEPS + 1)
        whole = Transitions(
            domain, run, prior.clone(), prior, mask, torch.full((STEPS,), LIMIT), prior, torch.zeros(STEPS), left,
            tokens, torch.full((STEPS,), float(STEPS)),
        )  # fmt: skip
        for step in range(STEPS):
            whole.weights[step] = weights[-1]
            states = whole.states(torch.tensor([step]))
            drift = 0.8 * drift + torch.from_numpy(rng.normal(0, 0.6, size)).float()
            with torch.no_grad():
                action = move(states, torch.tanh(drift)) if policy is None else act(policy, states)
            actions.append(action[0])
            weights.append(action[0])
        action = torch.stack(actions)
        parts.append(
            replace(whole, weights=torch.stack(weights[:-1]), action=action, reward=(action * good).sum(1) / STEPS)
        )
    return Transitions.join(parts)


def worth(policy, sizes=(2, 7), seed=99) -> float:
    data = invented(40, seed, sizes, policy)
    return float(np.mean([data.reward[list(run)].sum() for run in data.runs()]))


@pytest.fixture(scope="module")
def data():
    torch.set_num_threads(1)
    return invented(150, 0)


def new_actor(kind=SetNetwork) -> Network:
    torch.manual_seed(0)
    actor = kind()
    actor.low.fill_(-5)
    actor.high.fill_(5)
    return actor


def learnt(data, name, updates, kind=SetNetwork):
    return learn(data, new_actor(kind), name, updates, seed=0)[0]


def small_history() -> HistoryNetwork:
    return HistoryNetwork(hidden=16, heads=2)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "updates", "ahead"), [("awr", 150, 0.15), ("iql", 200, 0.15), ("cql", 100, 0.15)])
def test_what_is_learnt_is_better_than_the_data_also_among_more_domains_than_there_were(data, name, updates, ahead):
    actor = learnt(data, name, updates)
    assert worth(actor) > worth(None) + ahead
    assert worth(actor, sizes=(12, 13)) > worth(None, sizes=(12, 13)) + ahead


def test_cloning_does_as_well_as_the_data(data):
    assert worth(learnt(data, "bc", 200)) == pytest.approx(worth(None), abs=0.08)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "updates", "ahead"), [("awr", 150, 0.15), ("iql", 200, 0.15), ("cql", 100, 0.15)])
def test_the_transformer_learns_from_the_same_data(data, name, updates, ahead):
    assert worth(learnt(data, name, updates, small_history)) > worth(None) + ahead


@pytest.mark.slow
@pytest.mark.parametrize("kind", [SetNetwork, small_history])
@pytest.mark.parametrize("name", LEARNERS)
def test_the_same_seed_learns_the_same_bits(data, name, kind):
    first, second = (learnt(data, name, 5, kind).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def noisy(runs: int, seed: int, sizes=(2, 7)) -> Transitions:
    """As invented, with features of everything that differ from moment to moment."""
    data = invented(runs, seed, sizes)
    generator = torch.Generator().manual_seed(seed)
    domain = torch.randn(data.domain.shape, generator=generator) * data.mask[..., None]
    return replace(data, domain=domain, run=torch.randn(data.run.shape, generator=generator))


@pytest.fixture(scope="module")
def history():
    actor = new_actor(small_history)
    with torch.no_grad():
        actor.head.weight.mul_(50)
    return actor.requires_grad_(False)


def test_the_transformer_is_shown_the_run_of_each_decision_up_to_it(history):
    """In a batch of several sizes and places, it asks for what the policy would after that history."""
    data = noisy(4, 6)
    index = torch.tensor([5, 0, STEPS + 3, 3 * STEPS - 1, 4 * STEPS - 2, 5])
    states = data.states(index)
    found = moves(history, states)
    for row, number in enumerate(index.tolist()):
        run = list(data.runs())[number // STEPS]
        size = int(data.mask[number].sum())
        remembered = History(history, size)
        for i in range(run.start, number + 1):
            seen = (data.domain[i, :size], data.run[i], data.weights[i, :size], data.prior[i, :size])
            u = remembered.answer(*(part.numpy() for part in seen), float(data.tokens[i]), float(data.budget[i]))
        np.testing.assert_allclose(found[row, :size], np.tanh(u), atol=5e-3)
        assert (found[row, size:] == 0).all()
        assert found[row, :size].std() > 0.02
    # Together, those of a run are the same as one by one.
    together = torch.tensor([5, 0, STEPS + 3, STEPS + 11])
    one, many = (moves(history, data.states(together, count)) for count in (1, 2))
    torch.testing.assert_close(one, many)


def test_a_batch_for_the_transformer_has_some_runs_whose_signals_are_missing_throughout(history):
    data = noisy(30, 7)
    learner = BehaviourCloning(data, history, 0, 1)
    shares = []
    for _ in range(20):
        batch = learner.batch()
        assert len(batch.numbers) == BATCH
        seen, at = learner.states(batch).runs()
        grouped = {name: rows.view(-1, TOGETHER) for name, rows in batch.without.items()}
        for rows in (data.begin[batch.numbers].view(-1, TOGETHER), *grouped.values()):
            assert (rows == rows[:, :1]).all()
        for signal, names in OF_SIGNALS.items():
            gone, columns = grouped[signal][:, 0], feature_columns(names)
            for values, of_signal in zip((seen.domain, seen.run), columns, strict=True):
                assert (values[gone][..., of_signal] == 0).all()
            assert (seen.run[~gone][..., columns[1]] != 0).all()
            shares.append(gone.float().mean())
        decided = data.tokens[batch.numbers].view(at.shape)
        assert torch.equal(seen.tokens[torch.arange(len(at))[:, None], at], decided)
    assert np.mean(shares) == pytest.approx(QUIET, abs=0.1)
    begins = torch.cat([data.begin[learner.batch().numbers] for _ in range(60)])
    assert len(begins.unique()) == 30


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
