"""Objective weights: w / q at the step that the clock says, equal in expectation to drawing with w."""

import json

import numpy as np
import pytest
import torch
from corpora import tagged_domains
from hypothesis import given
from hypothesis import strategies as st
from mixing import RandomWalk, Told, assert_same_batches, count, train

from mixloader import DomainCrossEntropy, Manifest, MixLoader, domain_cross_entropy
from mixloader.errors import ConfigError, StateError
from mixloader.guards import Guards
from mixloader.mixer import Mixer
from mixloader.mixture import as_fractions
from mixloader.objective import FLOOR, objective_weights
from mixloader.record import read_record
from mixloader.replay import replay

T = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return Manifest.open(tagged_domains(folder, {"web": [700, 300], "code": [400], "math": [90]}))


def open_loader(data, accumulation=1, **options):
    return MixLoader(data, 4, T, grad_accumulation_steps=accumulation, seed=3, num_workers=0, **options)


def mixtures(n):
    return st.lists(st.floats(0, 1), min_size=n, max_size=n).filter(lambda w: max(w) > 1e-6).map(np.array)


# The factors


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(mixtures(n), mixtures(n))))
def test_the_mean_factor_over_drawn_tokens_is_1(pair):
    wanted, drawn = pair
    factors = objective_weights(wanted, drawn)
    q = drawn / drawn.sum()
    assert abs(q @ factors - 1) < 1e-9
    assert (factors >= 0).all()
    if (q >= FLOOR / len(q)).all():
        assert np.allclose(q * factors, wanted / wanted.sum(), rtol=1e-9, atol=1e-12)


def test_rare_domains_do_not_get_huge_factors_and_undrawn_ones_give_theirs_away():
    assert objective_weights(np.array([0.5, 0.5]), np.array([1 - 1e-9, 1e-9]))[1] < 2 / FLOOR
    assert np.allclose(objective_weights(np.array([0.2, 0.3, 0.5]), np.array([0.5, 0.5, 0])), [0.8, 1.2, 0])
    assert objective_weights(np.array([0.0, 1.0]), np.array([1.0, 0.0])).tolist() == [1, 1]


def test_gradients_are_those_of_the_other_mixture_in_expectation():
    """All rows that could be drawn, as often as q says (8 : 1 : 3), against all rows as often as w says (1 : 2 : 3)."""
    generator = torch.Generator().manual_seed(0)
    rows, classes, width = 24, 11, 6
    inputs = torch.randn(3, rows, width, dtype=torch.float64, generator=generator)
    targets = torch.randint(classes, (3, rows), generator=generator)
    weight = torch.randn(classes, width, dtype=torch.float64, generator=generator)

    def gradient(copies, **options):
        model = weight.clone().requires_grad_()
        ids = torch.repeat_interleave(torch.arange(3), torch.tensor(copies))
        logits = inputs[ids].flatten(0, 1) @ model.T
        of_rows = ids.repeat_interleave(rows)
        domain_cross_entropy(logits, targets[ids].flatten(), of_rows, **options).backward()
        return model.grad

    factors = torch.from_numpy(objective_weights(np.array([1.0, 2, 3]), np.array([8.0, 1, 3])))
    ours = gradient([8, 1, 3], domain_weights=factors)
    assert torch.allclose(ours, gradient([1, 2, 3]), rtol=1e-12, atol=1e-14)
    assert not torch.allclose(ours, gradient([8, 1, 3]), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("sampling", ["quota", "multinomial"])
def test_gradients_of_a_run_are_those_of_the_mixture_that_the_policy_wants(data, sampling):
    """Over many drawn batches the mean gradient of a linear model comes near the one of the wanted mixture."""
    torch.manual_seed(0)
    table = torch.randn(3, 5, dtype=torch.float64)
    wanted = np.array([0.2, 0.2, 0.6])

    def mean_gradient(steps, weights, act):
        policy = Told(lambda o: None, first=wanted if act == "objective" else None)
        with (
            MixLoader(data, 64, T, seed=3, num_workers=0, weights=weights, sampling=sampling) as loader,
            Mixer(loader, policy, act=act, decide_every=100) as mixer,
        ):
            total = torch.zeros_like(table)
            for _ in range(steps):
                batch = next(loader)
                logits, ids = table.clone().requires_grad_(), batch["domain_ids"]
                domain_cross_entropy(logits[ids], ids, ids, domain_weights=mixer.domain_weights).backward()
                mixer.step()
                total += logits.grad
            return total / steps

    expected = torch.stack(
        [w * (torch.softmax(row, 0) - torch.eye(5)[d]) for d, (w, row) in enumerate(zip(wanted, table, strict=True))]
    )
    ours = mean_gradient(60, [0.5, 0.3, 0.2], "objective")
    assert (ours - expected).abs().max() < 0.03
    assert (mean_gradient(10, [0.5, 0.3, 0.2], "sampling") - expected).abs().max() > 0.1


# The clock


def one_domain(observation):
    return np.eye(3)[observation.step % 3] + 0.1


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_factors_change_at_the_effect_step_for_all_its_micro_batches(data, tmp_path, lag, every, accumulation):
    path, q = tmp_path / "record.jsonl", np.array([0.5, 0.25, 0.25])
    policy = Told(one_domain)
    with (
        open_loader(data, accumulation, weights=q) as loader,
        Mixer(loader, policy, lag=lag, decide_every=every, act="objective", record=path) as mixer,
    ):
        batches, seen = [], []
        for step in range(10):
            for _ in range(accumulation):
                batches.append(next(loader))
                seen.append((step, mixer.domain_weights.tolist()))
                count(mixer, batches[-1])
            mixer.step()
        assert np.array_equal(loader.weights, q), "the mixture that is drawn stays"
    for step, factors in seen:
        sources = [s for s in range(step - lag) if (s + 1) % every == 0]
        wanted = np.eye(3)[sources[-1] % 3] + 0.1 if sources else q
        assert np.allclose(factors, wanted / wanted.sum() / q, rtol=1e-6)
    for observation in policy.seen:
        earlier = [s for s in range(observation.effect_step - lag - 1) if (s + 1) % every == 0]
        wanted = np.eye(3)[earlier[-1] % 3] + 0.1 if earlier else q
        assert np.allclose(observation.weights, wanted / wanted.sum()), "a policy sees its own weights"
    record = read_record(path)
    assert record.header["act"] == "objective"
    for decision in record.decisions:
        wanted = np.eye(3)[decision["step"] % 3] + 0.1
        assert np.allclose(as_fractions(decision["objective"]), wanted / wanted.sum())
        assert np.array_equal(as_fractions(decision["weights"]), q)
    with replay(record, data) as again:
        assert_same_batches([next(again) for _ in batches], batches)


def test_factors_are_over_the_mixture_that_drew_the_batch(data, tmp_path):
    path, wanted = tmp_path / "record.jsonl", np.array([0.2, 0.3, 0.5])
    policy = Told(lambda o: wanted, first=wanted)
    with open_loader(data, 2) as loader, Mixer(loader, policy, act="objective", record=path) as mixer:
        loader.set_weights([1, 1, 2])
        batches = [next(loader)]
        assert np.allclose(mixer.domain_weights, wanted * [4, 4, 2])
        loader.set_weights([2, 1, 1])  # from step 1: the rest of step 0 is drawn as it began
        batches.append(next(loader))
        assert np.allclose(mixer.domain_weights, wanted * [4, 4, 2])
        mixer.step()
        assert np.allclose(mixer.domain_weights, wanted * [2, 4, 4])
        batches += train(loader, mixer, 3)
        loader.set_weights([1, 0, 1], step=4)
        batches += train(loader, mixer, 5)
        next(loader)
        assert np.allclose(mixer.domain_weights, [0.2 / 0.35, 0, 0.5 / 0.35])
    with replay(path, data) as again:
        assert_same_batches([next(again) for _ in batches], batches)


def test_domains_that_have_run_out_are_not_counted_on(data):
    wanted = np.array([0.2, 0.3, 0.5])
    policy = Told(lambda o: wanted, first=wanted)
    with open_loader(data, max_epochs={"math": 1}) as loader, Mixer(loader, policy, lag=0, act="objective") as mixer:
        loader.set_weights([1, 1, 2])
        train(loader, mixer, 12)
        assert loader.exhausted == ("math",)
        next(loader)
        assert np.allclose(mixer.domain_weights, [0.8, 1.2, 0])
        assert np.allclose(policy.seen[-1].weights, [0.4, 0.6, 0])


def test_a_schedule_of_the_loader_is_what_the_factors_are_over(data):
    wanted = np.array([0.2, 0.3, 0.5])
    with (
        open_loader(data, weights=lambda step: [1 + step, 1, 1]) as loader,
        Mixer(loader, Told(lambda o: wanted, first=wanted), act="objective") as mixer,
    ):
        for step in range(5):
            q = np.array([1 + step, 1, 1]) / (3 + step)
            for _ in ("before the draw", "after it"):
                assert np.allclose(mixer.domain_weights, wanted / q, rtol=1e-6)
                loader.step == step and next(loader)
            mixer.step()


def test_one_tensor_is_written_to_for_modules_and_graphs_that_keep_it(data):
    with open_loader(data) as loader, Mixer(loader, Told(one_domain), lag=0, act="objective") as mixer:
        loss = DomainCrossEntropy(domain_weights=mixer.domain_weights)
        address = mixer.domain_weights.data_ptr()
        train(loader, mixer, 2)
        assert mixer.domain_weights.data_ptr() == address
        assert torch.equal(loss.domain_weights, mixer.domain_weights)
    with open_loader(data) as loader, Mixer(loader, "natural") as mixer:
        assert mixer.domain_weights is None


# State, domains, guards


@pytest.mark.parametrize(("lag", "every"), [(0, 1), (2, 1), (1, 3)])
def test_a_resumed_run_goes_on_with_the_same_factors(data, tmp_path, lag, every):
    options = {"lag": lag, "decide_every": every, "act": "objective", "record": tmp_path / "record.jsonl"}

    def go_on(loader, mixer):
        seen = []
        for _ in range(6):
            batch = next(loader)
            seen.append(mixer.domain_weights.tolist())
            count(mixer, batch)
            mixer.step()
        return seen, mixer.state_dict()

    with open_loader(data) as loader, Mixer(loader, RandomWalk(), **options) as mixer:
        train(loader, mixer, 5)
        saved = json.loads(json.dumps([loader.state_dict(), mixer.state_dict()]))
        whole = go_on(loader, mixer)
    with open_loader(data) as loader, Mixer(loader, RandomWalk(), **options) as mixer:
        loader.load_state_dict(saved[0])
        mixer.load_state_dict(saved[1])
        assert go_on(loader, mixer) == whole
    with open_loader(data) as loader, Mixer(loader, RandomWalk(), lag=lag, decide_every=every) as mixer:
        loader.load_state_dict(saved[0])
        with pytest.raises(StateError, match="of a run with act='objective'; this mixer has the other"):
            mixer.load_state_dict(saved[1])


def test_domains_come_and_go(data, tmp_path):
    path = tmp_path / "record.jsonl"
    more = tagged_domains(tmp_path, {"more": [300]})["more"]
    wanted = {3: [0.2, 0.3, 0.5], 4: [0.1, 0.2, 0.3, 0.4]}
    policy = Told(lambda o: wanted[len(o.weights)] if o.step != 4 else None)
    with (
        open_loader(data, weights=[1, 1, 2]) as loader,
        Mixer(loader, policy, lag=0, act="objective", record=path) as mixer,
    ):
        batches = train(loader, mixer, 3)
        mixer.add_domain("more", more, 0.2)
        batches.append(next(loader))
        # The new one gets its share of the mixture, the others keep the ratios that were wanted.
        assert np.allclose(mixer.domain_weights, np.array([0.16, 0.24, 0.4, 0.2]) / [0.2, 0.2, 0.4, 0.2])
        count(mixer, batches[-1])
        mixer.step()
        mixer.remove_domain("math")
        batches.append(next(loader))
        assert np.allclose(mixer.domain_weights, np.array([0.1, 0.2, 0, 0.4]) / 0.7 * 3)
        count(mixer, batches[-1])
        mixer.step()
        batches += train(loader, mixer, 7)
    record = read_record(path)
    assert all(len(decision["objective"]) == 4 for decision in record.decisions)


def test_guards_hold_for_objective_weights(data, tmp_path):
    path = tmp_path / "record.jsonl"
    with (
        open_loader(data, weights=[1, 1, 1]) as loader,
        Mixer(
            loader, Told(lambda o: [1, 0, 0]), lag=0, act="objective", guards=Guards(floor=0.1), record=path
        ) as mixer,
    ):
        train(loader, mixer, 2)
        next(loader)
        assert np.allclose(mixer.domain_weights, [2.4, 0.3, 0.3], rtol=1e-6)
    decision = read_record(path).decisions[0]
    assert np.allclose(as_fractions(decision["requested"]), [1, 0, 0])
    assert np.allclose(as_fractions(decision["objective"]), [0.8, 0.1, 0.1])


def test_another_way_to_act_is_refused(data):
    with open_loader(data) as loader, pytest.raises(ConfigError, match="act is 'magic'; expected 'sampling' or"):
        Mixer(loader, "natural", act="magic")
