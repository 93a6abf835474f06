"""Static policies and the registry."""

import subprocess
import sys

import numpy as np
import pytest

from mixloader.errors import ConfigError, WeightsError
from mixloader.observation import DomainTable
from mixloader.policies import Policy, make_policy

NAMES = ("a", "b", "c", "d")
TABLE = DomainTable(
    names=NAMES,
    fields=("source", "source", "target", None),
    groups=(None,) * 4,
    tokens=np.array([300, 100, 200, 400]),
    prior=np.full(4, 0.25),
)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("natural", {}, [0.3, 0.1, 0.2, 0.4]),
        ("uniform", {}, [0.25, 0.25, 0.25, 0.25]),
        ("fixed", {"weights": {"c": 3.0, "a": 1.0}}, [0.25, 0.0, 0.75, 0.0]),
        ("fixed", {"weights": [1, 1, 2, 0]}, [0.25, 0.25, 0.5, 0.0]),
        ("fields", {}, [0.375, 0.125, 0.5, 0.0]),
        ("fields", {"source": 0.2}, [0.15, 0.05, 0.8, 0.0]),
        ("fields", {"source": 0}, [0.0, 0.0, 1.0, 0.0]),
    ],
)
def test_static_mixture(name, options, expected):
    policy = make_policy(name, **options)
    assert isinstance(policy, Policy)
    np.testing.assert_allclose(policy.reset(TABLE), expected, rtol=1e-15)
    assert policy.decide(None) is None
    policy.load_state_dict(policy.state_dict())


def test_fixed_weights_are_checked_against_the_domains():
    with pytest.raises(WeightsError, match="unknown domain 'x'"):
        make_policy("fixed", weights={"x": 1.0}).reset(TABLE)
    with pytest.raises(WeightsError, match="expected \\[4\\]"):
        make_policy("fixed", weights=[1.0, 2.0]).reset(TABLE)


def test_fields_needs_domains_of_a_field_that_gets_a_share():
    sources = DomainTable(NAMES, ("source",) * 4, (None,) * 4, TABLE.tokens, TABLE.prior)
    with pytest.raises(ConfigError, match="no domain of that field"):
        make_policy("fields").reset(sources)
    np.testing.assert_allclose(make_policy("fields", source=1.0).reset(sources), [0.3, 0.1, 0.2, 0.4])
    with pytest.raises(ConfigError, match="from 0 to 1"):
        make_policy("fields", source=1.5)


def test_unknown_name_and_option_are_named():
    with pytest.raises(ConfigError, match="unknown policy 'agnet'; known policies are acodm, ") as caught:
        make_policy("agnet")
    assert all(name in str(caught.value) for name in ("agent", "fields", "fixed", "natural", "uniform"))
    with pytest.raises(ConfigError, match="cannot be made"):
        make_policy("natural", temperature=2)
    policy = make_policy("natural")
    assert make_policy(policy) is policy
    with pytest.raises(ConfigError, match="set them on the object"):
        make_policy(policy, weights=[1])


def test_a_family_loads_when_it_is_asked_for_and_numba_only_with_the_agent():
    code = """
import sys
from mixloader.policies import make_policy, policy_names
make_policy("natural")
names = policy_names()
families = lambda: {name for name in sys.modules if name.startswith("mixloader.policies.")}
assert families() == {"mixloader.policies." + name for name in ("base", "static")}, families()
for name in set(names) - {"agent"}:
    try:
        make_policy(name)
    except Exception as error:
        assert "required positional argument" in str(error), error
assert len(families()) > 8
assert not {"numba", "scipy"} & set(sys.modules)
make_policy("agent")
assert "numba" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
