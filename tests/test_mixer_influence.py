"""A Mixer that measures influence: the clock, observations, resume, changing domains, the record and the trainer."""

import json

import numpy as np
import pytest
import torch
from agent_runs import save_random
from corpora import tagged_domains
from influence_run import small_model
from mixing import RandomWalk, Told, assert_same_batches, kill
from test_trainer import assert_same_run, train_until
from tiny_run import tiny_config, tiny_data

from mixloader import Influence, Manifest, Mixer, MixLoader, domain_cross_entropy, read_record
from mixloader.agent.network import SetNetwork
from mixloader.agent.policy import Agent
from mixloader.agent.transformer import HistoryNetwork
from mixloader.config import ModelConfig
from mixloader.errors import ConfigError, RecordError, StateError
from mixloader.policies import register
from mixloader.train.model import build_model
from mixloader.train.trainer import train as train_run

T = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return Manifest.open(tiny_data(tmp_path_factory.mktemp("data")))


class Walk(RandomWalk):
    """Moves by influence, too."""

    needs = frozenset({"loss", "influence"})

    def decide(self, observation):
        if observation.influence is not None:
            self.level = self.level + np.nan_to_num(observation.influence.value).sum(1)
        return super().decide(observation)


def open_loader(data, **options):
    return MixLoader(data, 6, T, seed=3, num_workers=0, **options)


def new_model():
    torch.manual_seed(0)
    return build_model(ModelConfig(vocab_size=50, seq_len=T, n_layer=2, n_head=2, n_embd=16))


def new_influence(model, **options):
    return Influence(model, **{"rank": 4, "stride": 2, "probe_every": 3, "probe_rows": 4, **options})


def run(loader, mixer, model, until):
    batches = []
    while loader.step < until:
        for _ in range(loader.grad_accumulation_steps):
            batches.append(next(loader))
            logits = model(batches[-1]["input_ids"])
            loss = domain_cross_entropy(logits, batches[-1]["targets"], batches[-1]["domain_ids"], stats=mixer.stats)
            loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.05 * parameter.grad
                parameter.grad = None
        mixer.step()
    return batches


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_policy_sees_exactly_what_was_measured_up_to_its_step(data, lag, accumulation):
    policy, model = Told(lambda observation: None), new_model()
    with (
        open_loader(data, grad_accumulation_steps=accumulation) as loader,
        Mixer(loader, policy, lag=lag, influence=new_influence(model)) as mixer,
    ):
        known = []
        for step in range(8):
            run(loader, mixer, model, step + 1)
            snapshot = mixer.influence.snapshot()
            known.append(None if snapshot is None else snapshot.wait())
    for step, (observation, table) in enumerate(zip(policy.seen, known, strict=True)):
        assert observation.step == step
        if step == 0:
            assert observation.influence is None is table
            continue
        assert observation.influence_fields == ("source", "target")
        assert np.array_equal(observation.influence.value, table.value, equal_nan=True)
        assert np.array_equal(observation.gram.value, table.gram, equal_nan=True)
        sketched, probed = (step - 1) // 2 * 2 + 1, (step - 2) // 3 * 3 + 2
        since = step - min(sketched, probed) if step >= 2 else -1
        assert (observation.influence.age == since).all()
        assert (observation.influence.count > 0).all()
        assert np.isfinite(observation.influence.value).all() == (step >= 2)
    assert np.isfinite(policy.seen[-1].influence_std).all()
    assert (policy.seen[-1].row_norm_sq > 0).all()


def test_a_policy_that_needs_influence_is_refused_without(data):
    with open_loader(data) as loader:
        with pytest.raises(ConfigError, match=r"needs the signal 'influence'.*influence=Influence\(model\)"):
            Mixer(loader, Walk())
        model = new_model()
        with Mixer(loader, Walk(), influence=new_influence(model)):
            assert any(module._forward_hooks for module in model.modules())
        assert not any(module._forward_hooks for module in model.modules()), "the mixer closes it"


def test_data_without_fields_or_held_out_tokens_are_refused(tmp_path):
    plain = Manifest.open(tagged_domains(tmp_path, {"web": [400], "code": [400]}))
    with open_loader(plain) as loader, pytest.raises(ConfigError, match="both a field and held-out tokens"):
        Mixer(loader, "natural", influence=Influence(small_model()))


@pytest.mark.parametrize(
    ("stop", "policy"), [(1, "walk"), (3, "walk"), (4, "walk"), (7, "walk"), (7, "set"), (7, "transformer")]
)
def test_a_resumed_run_is_the_same_run(data, tmp_path, stop, policy):
    if policy != "walk":
        network = {"set": SetNetwork, "transformer": HistoryNetwork}[policy](hidden=8)
        weights = save_random(tmp_path / "weights.safetensors", network)

    def begin(model, path):
        made = Walk() if policy == "walk" else Agent(parameters=weights)
        return Mixer(loader, made, record=path, lag=1, influence=new_influence(model))

    def first_step(loader, mixer, model):
        batches = run(loader, mixer, model, 1)
        mixer.feedback({"target": 4.0, "prose": 3.5})
        return batches

    model = new_model()
    with open_loader(data) as loader, begin(model, tmp_path / "whole.jsonl") as mixer:
        whole = first_step(loader, mixer, model) + run(loader, mixer, model, 10)
        state, tensors = mixer.state_dict(), mixer.influence.state_dict()
        if policy != "walk":
            known = mixer.policy._maker.state
            assert np.isfinite(known.influence).all(), "it is told of influence, though it could do without"
            assert np.isfinite(known.feedback[4]).sum() == 2

    model = new_model()
    with open_loader(data) as loader:
        mixer = begin(model, tmp_path / "parts.jsonl")
        first_step(loader, mixer, model)
        run(loader, mixer, model, stop)
        saved = json.loads(json.dumps({"loader": loader.state_dict(), "mixer": mixer.state_dict()}, allow_nan=False))
        saved_tensors, parameters = mixer.influence.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}
        run(loader, mixer, model, min(stop + 2, 10))
        kill(mixer)

    model = new_model()
    model.load_state_dict(parameters)
    with open_loader(data) as loader, begin(model, tmp_path / "parts.jsonl") as mixer:
        loader.load_state_dict(saved["loader"])
        mixer.load_state_dict(saved["mixer"])
        mixer.influence.load_state_dict(saved_tensors)
        assert_same_batches(run(loader, mixer, model, 10), [b for b in whole if b["step"] >= stop])
        assert mixer.state_dict() == state
        assert all(torch.equal(tensors[key], value) for key, value in mixer.influence.state_dict().items())
    ours, theirs = read_record(tmp_path / "parts.jsonl"), read_record(tmp_path / "whole.jsonl")
    assert ours.decisions == theirs.decisions


def test_a_resume_without_the_state_of_influence_is_noticed(data):
    model = new_model()
    with open_loader(data) as loader, Mixer(loader, "natural", influence=new_influence(model)) as mixer:
        run(loader, mixer, model, 3)
        saved = loader.state_dict(), mixer.state_dict()
    with open_loader(data) as loader, Mixer(loader, "natural", influence=new_influence(model)) as mixer:
        loader.load_state_dict(saved[0])
        mixer.load_state_dict(saved[1])
        with pytest.raises(StateError, match="influence stands at plan step 0, the mixer at 3; when a run is resumed"):
            run(loader, mixer, model, 4)


def test_domains_may_come_and_go_and_steps_be_left_out(data, tmp_path):
    policy, model = Told(lambda observation: None), new_model()
    two = Manifest(data.domains[:2], data.vocab_size)
    probes = {"source": [next(iter(open_loader(data).held_out(4, domains=["prose"])))]}
    with (
        open_loader(two, weights=[1, 1]) as loader,
        Mixer(loader, policy, record=tmp_path / "r.jsonl", influence=new_influence(model, probes=probes)) as mixer,
    ):
        run(loader, mixer, model, 4)
        mixer.add_domain("maths", [shard.path for shard in data.domain("maths").shards], 0.5)
        run(loader, mixer, model, 6)
        assert mixer.skip(3) == 9
        run(loader, mixer, model, 12)
        mixer.remove_domain("code")
        run(loader, mixer, model, 16)
        mixer.state_dict()
    shapes = [None if o.influence is None else o.influence.value.shape for o in policy.seen]
    assert shapes == [None, (2, 1), (2, 1), (2, 1)] + [(3, 1)] * 9
    first = policy.seen[4]
    assert np.isfinite(first.influence.value[:2]).all()
    assert first.influence.age[:, 0].tolist() == [2, 2, -1], "rows of step 3, and of step 2 for the probe"
    last = policy.seen[-1]
    assert last.step == 15
    assert last.influence.age[1, 0] == 4, "the removed domain was last sketched in step 11"
    record = read_record(tmp_path / "r.jsonl")
    assert all(len(line["influence"]) == 3 for line in record.decisions if "influence" in line)
    assert record.decisions[3]["influence"][2] == [None]


def test_the_record_holds_influence_where_it_is_new(data, tmp_path):
    model, path = new_model(), tmp_path / "record.jsonl"
    policy = Told(lambda observation: None)
    with open_loader(data) as loader, Mixer(loader, policy, record=path, influence=new_influence(model)) as mixer:
        run(loader, mixer, model, 8)
    record = read_record(path)
    assert record.header["influence"] == {
        "fields": ["source", "target"], "layers": 8, "rank": 4, "stride": 2, "probe_every": 3, "probe_rows": 4,
        "half_life": 6.0, "seed": 0,
    }  # fmt: skip
    assert [d["step"] for d in record.decisions if "influence" in d] == [1, 2, 3, 5, 7]
    for decision, observation in zip(record.decisions, policy.seen, strict=True):
        if "influence" in decision and decision["step"] > 1:
            assert np.allclose(decision["influence"], observation.influence.value, rtol=5e-3)
    text = path.read_text()
    path.write_text(text.replace('"influence":[[', '"influence":[["x",', 1))
    with pytest.raises(RecordError, match="its 'influence' is"):
        read_record(path)


def test_a_decision_on_16_domains_and_two_fields_fits_in_1_KB(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 50, 4000).astype(np.uint16)
    for name in ("train.bin", "val.bin"):
        tokens.tofile(tmp_path / name)
    kind = {"path": tmp_path / "train.bin", "validation": tmp_path / "val.bin", "dtype": "uint16"}
    data = {f"domain-{d:02d}": {**kind, "field": ("source", "target")[d % 2]} for d in range(16)}
    model = new_model()
    policy = Told(lambda o: o.weights * np.exp(np.sin(np.arange(16))))
    with (
        MixLoader(data, 64, T, seed=3, num_workers=0) as loader,
        Mixer(
            loader, policy, record=tmp_path / "r.jsonl", influence=new_influence(model, stride=1, probe_every=1)
        ) as mixer,
    ):
        run(loader, mixer, model, 12)
    lines = [line for line in (tmp_path / "r.jsonl").read_bytes().splitlines() if b'"decision"' in line]
    assert b"influence" in lines[-1]
    assert max(map(len, lines)) <= 1024


@register("follow")
class Follow:
    """Weights by influence, as far as it is known."""

    needs = frozenset({"influence"})

    def reset(self, domains):
        self.n = len(domains)

    def decide(self, observation):
        if observation.influence is None:
            return None
        value = np.nan_to_num(observation.influence.value).sum(1)
        return 0.2 + np.clip(value / (np.abs(value).max() + 1e-12), 0, None)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_the_trainer_measures_influence_and_resumes_exactly(tmp_path, monkeypatch):
    data = tiny_data(tmp_path / "data")
    changes = {"policy": "follow", "influence": {"rank": 4, "stride": 2, "probe_every": 2, "probe_rows": 4}}
    whole = train_run(tiny_config(data, tmp_path / "whole", **changes))
    config = tiny_config(data, tmp_path / "parts", **changes)
    train_until(config, 7, monkeypatch)
    result = train_run(config)
    assert_same_run(result, whole)
    name = "influence.safetensors"
    assert (result.checkpoint / name).read_bytes() == (whole.checkpoint / name).read_bytes()
    decisions = read_record(whole.record).decisions
    assert sum("influence" in decision for decision in decisions) == 6
    assert len({tuple(decision["weights"]) for decision in decisions}) > 3
    with pytest.raises(ConfigError, match="influence cannot be measured with options"):
        train_run(tiny_config(data, tmp_path / "bad", **changes | {"influence": {"ranks": 4}}))
