"""Policies that need losses alone, in a Mixer: they decide, resume exactly, and see domains come and go."""

import inspect
import json

import pytest
from corpora import tagged_domains
from mixing import assert_same_batches, shipped_policies, train

from mixloader import MixLoader
from mixloader.manifest import Manifest
from mixloader.mixer import Mixer
from mixloader.policies import make_policy

TARGETS = {"web": 10.0, "code": 12.0}
OPTIONS = {
    "fixed": {"weights": {"web": 1, "code": 2, "math": 1}},
    "piecewise": {"knots": {0: {"web": 1}, 8: {"code": 1, "web": 1}}},
    "linear": {"knots": {0: {"web": 1}, 30: {"code": 1, "web": 1}}},
    "doremi": {"reference_losses": TARGETS},
    "dbl": {"target_losses": TARGETS, "update_steps": 5},
    "velocitune": {"target_losses": TARGETS, "update_steps": 5},
    "ado": {"start_step": 8, "fit_steps": 4, "ignore_steps": 0},
    "exp3": {"update_steps": 5},
    "aioli": {"trial_steps": 2, "rounds": 1, "update_steps": 12},
    "skillit": {"trial_steps": 2, "rounds": 1, "update_steps": 4},
}
FIELDS = {"agent", "fields"}
"""Policies that need domains with a field, which this corpus has not."""

NAMES = [
    name
    for name in shipped_policies()
    if name not in FIELDS and make_policy(name, **OPTIONS.get(name, {})).needs <= {"loss"}
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return Manifest.open(tagged_domains(folder, {"web": [7000], "code": [4000], "math": [900]}))


def open_run(data, name):
    loader = MixLoader(data, 16, 8, seed=3, num_workers=0, max_steps=40)
    return loader, Mixer(loader, name, decide_every=2, **OPTIONS.get(name, {}))


def decisions_of(mixer):
    """Count the decisions of a Mixer's policy, and let what it raises pass as it is."""
    decide, told = mixer.policy.decide, []

    def counted(observation):
        try:
            told.append(decide(observation))
        except Exception as error:
            told.append(error)
            raise
        return told[-1]

    mixer.policy.decide = counted
    return told


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_decides_in_a_mixer_and_resumes_exactly(data, name):
    loader, mixer = open_run(data, name)
    told = decisions_of(mixer)
    with loader, mixer:
        train(loader, mixer, 17)
        mixer.feedback({"web": 9.0, "code": 13.0, "math": 11.0})
        saved = json.dumps([loader.state_dict(), mixer.state_dict()], allow_nan=False)
        rest = train(loader, mixer, 36)
    assert not [answer for answer in told if isinstance(answer, Exception)]
    static = {"natural", "uniform", "fixed", "temperature"}
    assert any(answer is not None for answer in told) == (name not in static)
    loader, mixer = open_run(data, name)
    with loader, mixer:
        loader_state, mixer_state = json.loads(saved)
        loader.load_state_dict(loader_state)
        mixer.load_state_dict(mixer_state)
        assert_same_batches(train(loader, mixer, 36), rest)


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_goes_on_when_domains_come_and_go(data, name, tmp_path):
    loader, mixer = open_run(data, name)
    told = decisions_of(mixer)
    more = tagged_domains(tmp_path, {"law": [3000]})["law"]
    with loader, mixer:
        train(loader, mixer, 7)
        mixer.add_domain("law", more, 0.2)
        train(loader, mixer, 21)
        mixer.remove_domain("code")
        batches = train(loader, mixer, 36)
    assert not [answer for answer in told if isinstance(answer, Exception)]
    assert not any((batch["domain_ids"] == 1).any() for batch in batches)


@pytest.mark.parametrize("name", shipped_policies())
def test_no_option_of_a_policy_has_the_name_of_one_of_the_mixers(name):
    """They are given to it together: Mixer(loader, "agent", preference=0.7, record=...)."""
    options = inspect.signature(type(make_policy(name, **OPTIONS.get(name, {})))).parameters
    assert not set(options) & set(inspect.signature(Mixer).parameters)
