"""The agent's networks over sets of domains: the compiled one, the Transformer over the history, and the critic."""

import json

import numpy as np
import pytest
import torch
from agent_runs import Run, make_table, measured, noisy_losses

from mixloader.agent.action import soft_step
from mixloader.agent.critic import Critic
from mixloader.agent.feature_maker import features_of
from mixloader.agent.features import DOMAIN_FEATURES, GLOBAL_FEATURES, N_DOMAIN, N_GLOBAL, OF_SIGNALS
from mixloader.agent.network import SetNetwork, forward, load_parameters, save_parameters
from mixloader.agent.policy import SHIPPED, Agent
from mixloader.agent.transformer import LONGEST, HistoryNetwork, Seen
from mixloader.errors import StateError

LOSSES_ONLY = [n for n in (*DOMAIN_FEATURES, *GLOBAL_FEATURES) if n not in sum(OF_SIGNALS.values(), ())]


def widened(network):
    """With ranges for all features, and larger outputs than a network begins with."""
    network.low.fill_(-8)
    network.high.fill_(12)
    network.scale.fill_(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


@pytest.fixture
def history():
    torch.manual_seed(1)
    return widened(HistoryNetwork(hidden=16, heads=2)).eval().requires_grad_(False)


@pytest.fixture
def saved(history, tmp_path):
    history.save(tmp_path / "history.safetensors", seed=1)
    return tmp_path / "history.safetensors"


def states(batch, n_domains, seed=0, time=None):
    """domain, run, weights, prior, mask of random states, with a moment's axis if `time` is given."""
    g = torch.Generator().manual_seed(seed)
    lead = (batch,) if time is None else (batch, time)
    return (
        torch.randn(*lead, n_domains, N_DOMAIN, generator=g),
        torch.randn(*lead, N_GLOBAL, generator=g),
        torch.softmax(torch.randn(*lead, n_domains, generator=g), -1),
        torch.softmax(torch.randn(batch, *[1] * (len(lead) - 1), n_domains, generator=g), -1).expand(*lead, n_domains),
        torch.ones(*lead, n_domains, dtype=torch.bool),
    )


def pick(values, order):
    """The states with their domains in another order, or some of them twice."""
    domain, run, weights, prior, mask = values
    return domain[..., order, :], run, weights[..., order], prior[..., order], mask[..., order]


def padded(values, more):
    domain, run, weights, prior, mask = values
    pad = torch.nn.functional.pad
    return pad(domain, (0, 0, 0, more), value=7.0), run, *(pad(v, (0, more)) for v in (weights, prior, mask))


def moments(batch, time, seed=0):
    """Tokens and budget."""
    tokens = torch.rand(batch, time, generator=torch.Generator().manual_seed(seed)).sort(1).values
    return tokens, torch.ones(batch, time)


@pytest.mark.parametrize("features", [(*DOMAIN_FEATURES, *GLOBAL_FEATURES), LOSSES_ONLY], ids=["all", "losses"])
@pytest.mark.parametrize(("hidden", "blocks"), [(8, 1), (48, 2), (64, 2)])
def test_the_compiled_network_is_the_one_that_is_fitted(features, hidden, blocks, tmp_path):
    torch.manual_seed(0)
    network = widened(SetNetwork(features, hidden, blocks))
    save_parameters(network.parameters_as_arrays(), tmp_path / "w.safetensors", seed=0)
    parameters = load_parameters(tmp_path / "w.safetensors")
    assert parameters.features == list(features)
    for n_domains in (1, 2, 9, 70):
        values = states(1, n_domains, n_domains)
        domain, run, weights, prior, _ = (v[0].numpy() for v in values)
        ours = forward(domain, run, weights.astype(np.float64), prior.astype(np.float64), parameters)
        theirs = network(*padded(values, 3))[0, :n_domains].detach().numpy()
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=1e-4)
        assert n_domains == 1 or np.ptp(ours) > 1e-3


def test_the_transformer_does_not_see_the_order_of_domains_nor_padding(history):
    values, when = states(2, 7, time=5), moments(2, 5)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(3))
    plain = history(Seen(*values, *when))
    torch.testing.assert_close(history(Seen(*pick(values, order), *when)), plain[..., order], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(history(Seen(*padded(values, 4), *when))[..., :7], plain, atol=1e-5, rtol=1e-4)
    assert plain.std(-1).min() > 1e-3


@pytest.mark.parametrize("kind", ["set", "history"])
def test_the_networks_take_two_halves_of_a_domain_for_the_whole(kind, history):
    twice = [0, 1, 2, 3, 3]
    half = torch.tensor([1, 1, 1, 2, 2])
    torch.manual_seed(0)
    network = widened(SetNetwork(hidden=16)) if kind == "set" else history
    values = states(2, 4, time=6 if kind == "history" else None)
    domain, run, weights, prior, mask = pick(values, twice)
    halved = domain, run, weights / half, prior / half, mask
    if kind == "history":
        values, halved = (Seen(*those, *moments(2, 6)) for those in (values, halved))
        halves, whole = network(halved), network(values)
    else:
        halves, whole = network(*halved), network(*values)
    torch.testing.assert_close(halves, whole[..., twice], atol=1e-5, rtol=1e-4)


def test_the_transformer_looks_back_and_never_ahead(history):
    values, when = states(1, 3, time=8), moments(1, 8)
    plain = history(Seen(*values, *when))
    changed = (values[0].clone(), *values[1:])
    changed[0][:, 4] += 1.0
    other = history(Seen(*changed, *when))
    torch.testing.assert_close(other[:, :4], plain[:, :4], atol=0, rtol=0)
    for later in range(4, 8):
        assert (other[:, later] - plain[:, later]).abs().max() > 1e-4
    # Of a domain, nothing is seen of the time in which it was not there.
    there = values[4].clone()
    there[:, :5, 1] = False
    weights = values[2] * there
    without = history(Seen(values[0], values[1], weights, values[3], there, *when))
    changed[0][:, 4] = values[0][:, 4]
    changed[0][:, :5, 1] += 1.0
    again = history(Seen(changed[0], values[1], weights, values[3], there, *when))
    torch.testing.assert_close(again[:, 5:], without[:, 5:])


def test_decisions_with_the_transformer_are_those_of_the_whole_run_at_once(saved):
    """What is fitted, on a run from begin to end, is what decides, step by step, but for half precision.

    In the middle of the run, a domain is out of the mixture.
    """
    table, paths = make_table(5, 2), noisy_losses(5, 40, 2)
    network = HistoryNetwork.load(saved)
    run = Run(table, 40, lambda p: paths[round(p * 40)], parameters=saved)
    observations, numbers = [], []
    real = run.agent._history.answer

    def answer(*args):
        numbers.append(real(*args))
        return numbers[-1]

    run.agent._history.answer = answer
    for i in range(30):
        if i in (10, 20):
            run.weights = np.where(np.arange(5) == 3, 0.0, table.prior) if i == 10 else table.prior
        observations.append(run.observe(**measured(feedback={"target": 3 - 0.02 * i})))
        run.weights = run.agent.decide(observations[-1])
    seen = features_of(table, observations, 0.5)
    assert seen.active[:, 3].sum() == 20
    np.testing.assert_allclose(seen.prior.sum(1), 1)
    domain, common, weights, prior, tokens, budget = (
        torch.from_numpy(values.astype(np.float32))[None]
        for values in (seen.domain, seen.run, seen.weights, seen.prior, seen.tokens, seen.budget)
    )
    active = torch.from_numpy(seen.active)[None]
    whole = network(Seen(domain, common, weights, prior, active, tokens, budget))[0].detach().numpy()
    np.testing.assert_allclose(whole[seen.active], np.array(numbers)[seen.active], atol=0.01)
    assert np.abs(np.log(run.weights / table.prior)).max() > 0.1


def test_a_long_history_is_thinned_and_its_state_is_exact(saved):
    table, paths = make_table(16, 5), noisy_losses(16, 400, 5)
    first, second = (Run(table, 400, lambda p: paths[round(p * 400)], parameters=saved) for _ in range(2))
    for decisions in (3, LONGEST, 100, 60):
        first.advance(decisions)
        text = json.dumps(first.agent.state_dict(), allow_nan=False)
        assert len(text) < 120_000
        tokens = json.loads(text)["history"]["tokens"]
        assert len(tokens) <= LONGEST
        np.testing.assert_allclose(np.diff(tokens), tokens[1] - tokens[0], rtol=1e-5)
        assert tokens[-1] > (first.done - 4) * first.step_tokens
        second.agent.reset(table)
        second.agent.load_state_dict(json.loads(text))
        second.weights, second.seen, second.done = first.weights, first.seen, first.done
        done = first.done
        ahead = [first.advance(1) for _ in range(3)]
        for weights in ahead:
            np.testing.assert_array_equal(second.advance(1), weights)
        first.agent.reset(table)
        first.agent.load_state_dict(json.loads(text))
        first.weights, first.done = ahead[-1], done
    second.agent.reset(make_table(4))
    with pytest.raises(StateError, match="this run of 4 domains"):
        second.agent.load_state_dict(json.loads(text))


def test_the_transformer_keeps_floor_and_cap_and_goes_on_with_more_domains(saved):
    table = make_table(5, 1)
    run = Run(table, 30, lambda p: np.full(len(run.table), np.nan if p < 0.2 else 3.0 - p), parameters=saved)
    run.advance(10)
    grown = make_table(7, 1)
    tokens = np.append(table.tokens, grown.tokens[5:])
    fields = (*table.fields, "source", "target")
    grown = type(table)(grown.names, fields, (None,) * 7, tokens, tokens / tokens.sum())
    run.agent.extend(grown)
    run.table, run.seen = grown, np.append(run.seen, [0, 0])
    run.weights = grown.prior.copy()
    for _ in range(15):
        weights = run.advance(1)
        assert abs(weights.sum() - 1) < 1e-9
        assert (weights >= 0.1 * grown.prior * (1 - 1e-9)).all()
        assert (weights <= np.maximum(0.95, grown.prior) * (1 + 1e-9)).all()
    run.weights = np.array([0.0, 0.4, 0.3, 0.1, 0.1, 0.1, 0.0])
    weights = run.advance(2)
    assert weights[0] == weights[6] == 0
    assert abs(weights.sum() - 1) < 1e-9


def test_files_of_the_other_network_are_refused(saved, tmp_path):
    with pytest.raises(StateError, match="no file of a transformer"):
        HistoryNetwork.load(SHIPPED)
    with pytest.raises(StateError, match="another version of the agent"):
        load_parameters(saved)
    assert Agent(parameters=saved).uses == {"influence", "feedback"}
    HistoryNetwork(LOSSES_ONLY, hidden=8, heads=1, layers=1).save(tmp_path / "losses.safetensors")
    assert Agent(parameters=tmp_path / "losses.safetensors").uses == frozenset()


@pytest.fixture
def critic():
    torch.manual_seed(2)
    return Critic(hidden=16)


def actions(batch, n_domains, seed=9):
    return torch.softmax(2 * torch.randn(batch, n_domains, generator=torch.Generator().manual_seed(seed)), -1)


def test_the_critic_does_not_see_the_order_of_domains_nor_padding(critic):
    values, action = states(3, 6), actions(3, 6)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(4))
    plain = critic(*values, action)
    assert plain.shape == (3,)
    torch.testing.assert_close(critic(*pick(values, order), action[:, order]), plain, atol=1e-5, rtol=1e-4)
    more = torch.nn.functional.pad(action, (0, 5))
    torch.testing.assert_close(critic(*padded(values, 5), more), plain, atol=1e-5, rtol=1e-4)


def test_the_critic_learns_which_domain_an_action_should_favour(critic):
    """An action is worth the weight it gives to the domain with a mark: also with more domains than in fitting."""
    mark = DOMAIN_FEATURES.index("gain")
    optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3)

    def error(n_domains, seed):
        values, action = states(64, n_domains, seed), actions(64, n_domains, seed)
        marked = torch.randint(n_domains, (64,), generator=torch.Generator().manual_seed(seed))
        values[0].mul_(0.1)
        values[0][torch.arange(64), marked, mark] = 2.0
        return (critic(*values, action) - action[torch.arange(64), marked]).pow(2).mean(), action.var()

    for step in range(250):
        optimizer.zero_grad()
        error(4, step)[0].backward()
        optimizer.step()
    for n_domains in (4, 7):
        wrong, spread = error(n_domains, 10_000)
        assert wrong < 0.3 * spread


def test_gradients_through_critic_and_actor_are_finite_at_the_corners_and_with_padding(critic):
    network = widened(SetNetwork(hidden=8))
    domain, run, weights, prior, mask = padded(states(2, 4), 3)
    weights = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0], [0.5, 0.5, 0, 0, 0, 0, 0]])
    action = soft_step(network(domain, run, weights, prior, mask), weights, torch.full((2, 1), 0.5), mask)
    critic(domain, run, weights, prior, mask, action).sum().backward()
    for parameter in (*network.parameters(), *critic.parameters()):
        assert torch.isfinite(parameter.grad).all()
    assert network.head_weight.grad.abs().max() > 0
