"""Reference losses: scores against sums by hand, token by token in a run, and laws against an independent fit."""

import json
import math

import numpy as np
import pytest
import torch
from corpora import tagged_domains
from hypothesis import given, settings
from hypothesis import strategies as st
from mixing import Told, count
from tiny_run import tiny_config, tiny_data
from torch import nn

from mixloader import Manifest, MixLoader, domain_cross_entropy
from mixloader.cli import main
from mixloader.errors import ConfigError, StateError
from mixloader.mixer import Mixer
from mixloader.observation import Observation
from mixloader.policies import register
from mixloader.record import read_record
from mixloader.scaling_law import fit_scaling_law, points_of_run
from mixloader.scorer import Reference, read_losses, score_domains, write_losses
from mixloader.train.checkpoint import load_model
from mixloader.train.trainer import train as train_run

T = 8


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return Manifest.open(tiny_data(tmp_path_factory.mktemp("data")))


class Bigram(nn.Module):
    def __init__(self, seed=0, classes=50):
        super().__init__()
        self.table = nn.Parameter(torch.randn(classes, classes, generator=torch.Generator().manual_seed(seed)))

    def forward(self, input_ids):
        return self.table[input_ids]


def window_means(model, tokens):
    """float64 [windows]: mean nats a token of each whole window of T tokens and their next ones."""
    chances = model.table.detach().double().log_softmax(dim=1)
    starts = range(0, len(tokens) - T, T)
    return np.array([-float(chances[tokens[i : i + T], tokens[i + 1 : i + T + 1]].mean()) for i in starts])


def tokens_of(shard):
    return np.fromfile(shard.path, dtype="<u4" if shard.dtype == "uint32" else "<u2", offset=shard.offset).astype(int)


# Means


def test_all_training_windows_are_scored_once(manifest):
    model = Bigram()
    scores = score_domains(model, manifest, seq_len=T, windows_per_domain=None, batch_size=7)
    assert set(scores) == set(manifest.names)
    for domain in manifest.domains:
        means = np.concatenate([window_means(model, tokens_of(shard)) for shard in domain.shards])
        score = scores[domain.name]
        assert (score.windows, score.tokens) == (len(means), len(means) * T)
        assert score.loss == pytest.approx(means.mean(), rel=1e-5)
        assert score.standard_error == pytest.approx(means.std(ddof=1) / math.sqrt(len(means)), rel=1e-4)


def test_a_sample_of_windows_comes_near_and_says_how_near(manifest):
    model = Bigram()
    every = score_domains(model, manifest, seq_len=T, windows_per_domain=None)
    for seed in range(3):
        some = score_domains(model, manifest, seq_len=T, windows_per_domain=50, batch_size=16, seed=seed)
        for name, score in some.items():
            assert (score.windows, score.tokens) == (50, 50 * T)
            assert abs(score.loss - every[name].loss) < 4 * score.standard_error


def test_held_out_windows_of_different_lengths_count_by_their_tokens(manifest):
    model = Bigram().train()
    scores = score_domains(model, manifest, seq_len=T, split="held_out", windows_per_domain=None)
    assert model.training
    chances = model.table.detach().double().log_softmax(dim=1)
    for domain in manifest.domains:
        tokens = tokens_of(domain.validation[0])
        losses = -chances[tokens[:-1], tokens[1:]].numpy()
        assert scores[domain.name].tokens == len(losses) == 499, "62 windows and one of 3 tokens"
        assert scores[domain.name].loss == pytest.approx(losses.mean(), rel=1e-5)


def test_a_file_of_losses_is_read_back(manifest, tmp_path):
    scores = score_domains(Bigram(), manifest, seq_len=T, windows_per_domain=1)
    write_losses(tmp_path / "ref.json", scores, model="a")
    assert read_losses(tmp_path / "ref.json") == {name: score.loss for name, score in scores.items()}
    assert json.loads((tmp_path / "ref.json").read_text())["domains"]["code"]["standard_error"] is None
    for content in ("{", "[]", '{"version": 2}', '{"version": 1, "domains": {"a": {"loss": "x"}}}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ConfigError, match=r"bad\.json"):
            read_losses(tmp_path / "bad.json")
    with pytest.raises(ConfigError, match=r"missing\.json"):
        read_losses(tmp_path / "missing.json")
    with pytest.raises(ConfigError, match="split is 'test'"):
        score_domains(Bigram(), manifest, seq_len=T, split="test")


# Token by token


def test_a_reference_gives_the_loss_of_each_target(manifest):
    model = Bigram()
    reference = Reference(model)
    inputs = torch.arange(3 * T).view(3, T)
    targets = inputs + 1
    targets[1, 4:] = -100
    losses = reference({"input_ids": inputs, "targets": targets})
    expected = nn.functional.cross_entropy(model.table[inputs].flatten(0, 1), targets.flatten(), reduction="none")
    assert torch.allclose(losses, expected.view(3, T))
    assert (losses[1, 4:] == 0).all()
    assert losses.dtype == torch.float32
    assert not losses.requires_grad
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_policies_see_the_excess_over_a_reference(tmp_path):
    data = Manifest.open(tagged_domains(tmp_path, {"web": [700], "code": [400], "math": [90]}))
    classes = 1 << 12
    generator = torch.Generator().manual_seed(0)
    table, reference_table = (torch.randn(classes, 9, generator=generator) for _ in range(2))

    def loss_of(table, batch):
        logits, targets = table[batch["input_ids"] % classes], batch["targets"] % 9
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(4, T)

    policy, excess = Told(lambda o: [1, 1, 0] if o.step == 3 else None), []
    with (
        MixLoader(data, 4, T, seed=3, num_workers=0, weights=[1, 1, 2]) as loader,
        Mixer(loader, policy, lag=0) as mixer,
    ):
        for step in range(6):
            batch = next(loader)
            logits = table[batch["input_ids"] % classes].requires_grad_()
            reference = loss_of(reference_table, batch) if step else None
            domain_cross_entropy(
                logits, batch["targets"] % 9, batch["domain_ids"], stats=mixer.stats, reference_losses=reference
            )
            if step:
                over = (loss_of(table, batch) - reference).clamp(min=0)
                excess.append([over[batch["domain_ids"] == d].double() for d in range(3)])
            mixer.step()
            state = mixer.state_dict()
        saved = json.loads(json.dumps([loader.state_dict(), state]))
        count(mixer, next(loader))
        mixer.step()
    assert policy.seen[0].excess is None
    latest = np.full(3, math.nan)
    for seen, of_domains in zip(policy.seen[1:6], excess, strict=True):
        for d, tokens in enumerate(of_domains):
            if tokens.numel():
                latest[d] = tokens.mean()
                assert (seen.excess.age[d], seen.excess.count[d]) == (0, tokens.numel())
            assert seen.excess.value[d] == pytest.approx(latest[d], abs=1e-6, nan_ok=True)
    assert policy.seen[5].excess.age[2] == 2, "domain 2 was not drawn any more"
    assert (policy.seen[6].excess.age > 0).all(), "no reference losses were given after step 5"
    again = Told(lambda o: None)
    with (
        MixLoader(data, 4, T, seed=3, num_workers=0, weights=[1, 1, 2]) as loader,
        Mixer(loader, again, lag=0) as mixer,
    ):
        loader.load_state_dict(saved[0])
        mixer.load_state_dict(saved[1])
        count(mixer, next(loader))
        mixer.step()
    assert np.array_equal(again.seen[0].excess.value, policy.seen[6].excess.value)
    assert np.array_equal(again.seen[0].excess.age, policy.seen[6].excess.age)


def test_a_policy_without_its_reference_says_so(tmp_path):
    data = Manifest.open(tagged_domains(tmp_path, {"web": [700], "code": [400]}))
    with MixLoader(data, 4, T, seed=3, num_workers=0) as loader, Mixer(loader, Excess(), lag=0) as mixer:
        count(mixer, next(loader))
        mixer.step()
        count(mixer, next(loader))
        with pytest.warns(RuntimeWarning, match="after plan step 1: ConfigError: the policy needs the excess over a"):
            mixer.step()


# Laws


@settings(max_examples=30)
@given(e=st.floats(0.5, 4), alpha=st.floats(0.05, 1.0), fall=st.floats(0.05, 3), points=st.integers(5, 20))
def test_exact_points_give_their_law(e, alpha, fall, points):
    """fall: how far the losses fall from the first point to where they will be in the end, in parts of e."""
    tokens = np.geomspace(1e6, 1e9, points)
    a = fall * e * 1e6**alpha
    law = fit_scaling_law(zip(tokens, e + a * tokens**-alpha, strict=True))
    assert law(1e10) == pytest.approx(e + a * 1e10**-alpha, rel=1e-3)
    assert law.error < 1e-5


def test_the_fit_is_that_of_an_independent_minimizer_and_a_wild_point_hardly_moves_it():
    optimize = pytest.importorskip("scipy.optimize", reason="scipy is not installed (pip install 'mixloader[fit]')")
    from scipy.special import huber

    rng = np.random.default_rng(0)
    tokens = np.geomspace(1e7, 3e9, 14)
    clean = 1.7 + 400 * tokens**-0.34
    losses = clean * np.exp(rng.normal(0, 2e-3, 14))
    losses[5] *= 1.1

    def cost(theta):
        predicted = np.logaddexp(theta[0], theta[1] - theta[2] * np.log(tokens))
        return huber(1e-3, predicted - np.log(losses)).sum()

    starts = [(e, a, alpha) for e in (-1, 0, 1) for a in (0, 5, 10) for alpha in (0.2, 0.5, 1)]
    options = {"maxiter": 4000, "maxfev": 4000, "xatol": 1e-10, "fatol": 1e-14}
    best = min((optimize.minimize(cost, s, method="Nelder-Mead", options=options) for s in starts), key=lambda r: r.fun)
    law = fit_scaling_law(zip(tokens, losses, strict=True))
    assert cost([math.log(law.e), math.log(law.a), law.alpha]) <= best.fun * (1 + 1e-4)
    assert law(3e10) == pytest.approx(1.7 + 400 * 3e10**-0.34, rel=0.02)
    assert law.error == pytest.approx(0.1 / math.sqrt(14), rel=0.2)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([(1, 2), (2, 1), (2, 1.1)], "three parameters, and there are losses after 2 numbers of tokens"),
        ([], "after 0 numbers"),
        ([(0, 2), (1, 2), (2, 3)], "above 0"),
        ([(1, math.nan), (2, 2), (3, 3)], "above 0"),
    ],
)
def test_points_that_leave_the_law_open_are_refused(points, message):
    with pytest.raises(ConfigError, match=message):
        fit_scaling_law(points)


# In the trainer and on the command line


@register("excess_of_tests")
class Excess:
    """More of what is farthest above the reference."""

    needs = frozenset({"excess"})

    def reset(self, domains):
        return None

    def decide(self, observation: Observation):
        return None if observation.excess is None else 0.1 + np.nan_to_num(observation.excess.value)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run, and its data."""
    folder = tmp_path_factory.mktemp("runs")
    data = tiny_data(folder / "data")
    train_run(tiny_config(data, folder / "first", steps=12, eval_every=2, policy="natural"), progress=False)
    return folder, data


def test_a_run_is_compared_with_the_model_of_another(runs):
    folder, data = runs
    options = {"policy": "excess_of_tests", "reference": str(folder / "first"), "eval_every": 0}
    train_run(tiny_config(data, folder / "second", **options), progress=False)
    weights = [decision["weights"] for decision in read_record(folder / "second" / "record.jsonl").decisions]
    assert len({tuple(w) for w in weights}) > 8, "the excess is measured at every step"
    with pytest.raises(ConfigError, match="has seq_len 16, less than the 32 of this run"):
        train_run(tiny_config(data, folder / "third", seq_len=32, reference=str(folder / "first")), progress=False)
    with pytest.raises(StateError, match="holds no checkpoint"):
        load_model(folder)


def test_a_reference_does_not_change_what_a_run_computes(runs):
    folder, data = runs
    train_run(tiny_config(data, folder / "alone"), progress=False)
    train_run(tiny_config(data, folder / "compared", reference=str(folder / "first")), progress=False)
    ours, theirs = (read_record(folder / name / "record.jsonl").decisions for name in ("alone", "compared"))
    assert ours == theirs


def test_objective_weights_guards_and_answers_in_the_trainer(runs):
    folder, data = runs
    probe = folder / "probe.jsonl"
    probe.write_text('{"prompt_ids": [1, 2, 3], "answer_ids": [4]}\n{"prompt_ids": [], "answer_ids": [4]}\n')
    options = {
        "policy": "chase", "act": "objective", "guards": {"floor": 0.2, "cap": 0.5},
        "feedback": True, "answers": {"target": str(probe)}, "grad_accumulation_steps": 2,
    }  # fmt: skip
    config = tiny_config(data, folder / "options", **options)
    with pytest.raises(Exception, match=r"line 2 has an empty prompt"):
        train_run(config, progress=False)
    probe.write_text('{"prompt_ids": [1, 2, 3], "answer_ids": [4]}\n')
    train_run(config, progress=False)
    record = read_record(folder / "options" / "record.jsonl")
    assert {tuple(decision["weights"]) for decision in record.decisions} == {tuple(record.header["weights"])}
    objective = np.array([decision["objective"] for decision in record.decisions]) / 2**30
    assert len(np.unique(objective, axis=0)) > 5
    assert objective.min() > 0.2 - 1e-6
    assert objective.max() < 0.5 + 1e-6
    told = [event["losses"] for event in record.events if event["event"] == "feedback"]
    field_mean = [losses["maths"] for losses in told]
    assert all(losses["target"] != mean for losses, mean in zip(told, field_mean, strict=True))
    with pytest.raises(ConfigError, match="no guards with options"):
        train_run(tiny_config(data, folder / "wrong", guards={"ceiling": 1}), progress=False)
    with pytest.raises(ConfigError, match="answers are given, but feedback is false"):
        tiny_config(data, folder / "wrong", answers={"target": str(probe)})


def test_the_verb_writes_losses_that_a_policy_takes(runs, capsys):
    folder, data = runs
    out = folder / "ref.json"
    assert (
        main(["score", str(folder / "first"), str(data), "--out", str(out), "--windows", "0", "--device", "cpu"]) == 0
    )
    assert "standard error" in capsys.readouterr().out
    model, manifest = load_model(folder / "first"), Manifest.open(data)
    expected = score_domains(model, manifest, seq_len=16, windows_per_domain=None)
    assert read_losses(out) == pytest.approx({name: score.loss for name, score in expected.items()})
    options = {"policy": "doremi", "policy_options": {"reference_losses": str(out)}, "eval_every": 0}
    train_run(tiny_config(data, folder / "fourth", **options), progress=False)
    record = read_record(folder / "fourth" / "record.jsonl")
    assert record.header["policy"]["options"]["reference_losses"] == read_losses(out)


def test_the_verb_extrapolates_the_losses_of_a_run(runs, capsys):
    folder, _ = runs
    out = folder / "targets.json"
    points = points_of_run(folder / "first")
    assert list(points) == ["prose", "code", "maths"]
    assert all([tokens for tokens, _ in of] == [128, 256, 384, 512, 640, 768] for of in points.values())
    assert main(["score", str(folder / "first"), "--at_tokens", "5000", "--out", str(out)]) == 0
    assert "error of the fit" in capsys.readouterr().out
    assert read_losses(out) == {name: fit_scaling_law(of)(5000) for name, of in points.items()}
    assert main(["score", str(folder / "first"), "--out", str(out)]) == 2
    assert "either data to score or --at_tokens" in capsys.readouterr().err
    late = ["score", str(folder / "first"), "--at_tokens", "5000", "--from_tokens", "600", "--out", str(out)]
    assert main(late) == 2
    assert "domain 'prose'" in capsys.readouterr().err
