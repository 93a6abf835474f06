"""What comparisons are made of: held-out text in two parts, the bootstrap, keys of results, suites."""

import dataclasses
import importlib
import itertools
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from comparing import suite_of, write_suite
from corpora import write_llmc
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from tiny_run import tiny_data

from mixloader import cli
from mixloader.compare import sources
from mixloader.compare.bootstrap import paired_bootstrap
from mixloader.compare.cache import Results
from mixloader.compare.setting import make_setting
from mixloader.compare.sources import source_digest
from mixloader.compare.suite import Entry, Suite
from mixloader.compare.texts import deal, split_manifest
from mixloader.errors import ConfigError, ManifestError, StateError
from mixloader.formats import read_tokens
from mixloader.manifest import Manifest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"))


# Held-out text


@given(st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=60), min_size=1, max_size=4), st.booleans())
def test_no_document_is_in_both_parts_and_none_is_lost(shards, known):
    """Tokens carry their place above their id; id 0 ends a document."""
    arrays = [np.array(shard) for shard in shards]
    marked = [1000 * (i + 1) + np.arange(len(a)) for i, a in enumerate(arrays)]
    eot = 0 if known else None
    parts = deal(arrays, eot)
    assert sorted(map(int, np.concatenate(parts))) == sorted(map(int, np.concatenate(arrays)))
    # The same dealing of marked tokens, with ends in the same places.
    ends = [set(mark[:-1][a[:-1] == 0].tolist()) if known else set() for mark, a in zip(marked, arrays, strict=True)]
    dealt = deal(
        [np.where(np.isin(m, list(e)), -1, m) for m, e in zip(marked, ends, strict=True)], -1 if known else None
    )
    feedback, score = (set(part.tolist()) - {-1} for part in dealt)
    assert not feedback & score
    documents = []
    for mark, own in zip(marked, ends, strict=True):
        cut = [int(m) - int(mark[0]) + 1 for m in sorted(own)] or [len(mark) // 2]
        documents += [set(d.tolist()) - own for d in np.split(mark, cut)]
    for document in documents:
        assert document <= feedback or document <= score
    longest = max(map(len, documents), default=0) + 1
    assert abs(len(dealt[0]) - len(dealt[1])) <= longest


def test_training_never_sees_the_score_text_and_feedback_is_of_the_probes_alone(tmp_path):
    shards = {}
    for number, name in enumerate(("a", "b", "c")):
        # Every token differs, so a text is known by its tokens; 0 ends a document of 7 tokens.
        held_out = number * 1000 + 1 + np.arange(210)
        held_out[6::7] = 0
        train = write_llmc(tmp_path / name / "train.bin", np.full(64, 5000 + number, dtype="<u4"))
        val = write_llmc(tmp_path / name / "val.bin", held_out.astype("<u4"))
        shards[name] = {"path": str(train), "validation": str(val)}
    manifest = dataclasses.replace(Manifest.open(shards), vocab_size=6000, eot=0)
    fields = {"c": "target", "a": "source", "b": None}
    training, scored = split_manifest(manifest, fields, {"a"}, tmp_path / "out")
    assert training.names == scored.names == ("c", "a", "b")
    assert [d.field for d in training.domains] == ["target", "source", None]
    assert [len(d.validation) for d in training.domains] == [0, 1, 0]
    assert [len(d.validation) for d in scored.domains] == [1, 1, 0]
    feedback, score = (
        set(read_tokens(m.domain("a").validation[0]).tolist()) - {0} for m in (training, scored)
    )  # fmt: skip
    assert not feedback & score
    assert feedback | score == set(read_tokens(manifest.domain("a").validation[0]).tolist()) - {0}
    bare = dataclasses.replace(manifest, domains=(dataclasses.replace(manifest.domain("a"), validation=()),))
    with pytest.raises(ManifestError, match="domain 'a' has 0 held-out tokens"):
        split_manifest(bare, {"a": "source"}, set(), tmp_path / "bare")


# The bootstrap


def test_two_seeds_give_their_own_range():
    """Draws of one scenario with values 1 and 3 are 1, 2, 3 with 1/4, 1/2, 1/4: the 2.5th percentile is 1."""
    interval = paired_bootstrap([[1.0, 3.0]])
    assert (interval.mean, interval.low, interval.high) == (2.0, 1.0, 3.0)
    half = paired_bootstrap([[1.0, 3.0]], level=0.4)  # the 30th and the 70th percentile
    assert (half.low, half.high) == (2.0, 2.0)


def test_one_scenario_is_scipys_percentile_bootstrap():
    values = np.random.default_rng(5).normal(0.3, 1.0, 25)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", random_state=np.random.default_rng(1)
    ).confidence_interval
    mine = paired_bootstrap([values], draws=20_000)
    assert (mine.low, mine.high) == pytest.approx((expected.low, expected.high), abs=0.02)


def test_scenarios_are_drawn_before_their_seeds():
    """Against all draws there are, of two scenarios of two and three seeds."""
    own = [[0.0, 1.0], [4.0, 5.0, 9.0]]
    means = [[np.mean(draw) for draw in itertools.product(values, repeat=len(values))] for values in own]
    every, weight = [], []
    for chosen in itertools.product((0, 1), repeat=2):
        for pair in itertools.product(*(means[s] for s in chosen)):
            every.append(np.mean(pair))
            weight.append(1 / (4 * math.prod(len(means[s]) for s in chosen)))
    order = np.argsort(every)
    cumulative = np.cumsum(np.array(weight)[order])
    for level in (0.5, 0.9, 0.95):
        mine = paired_bootstrap(own, level=level, draws=40_000)
        for share, found in (((1 - level) / 2, mine.low), ((1 + level) / 2, mine.high)):
            near = [np.array(every)[order][np.searchsorted(cumulative, share + d)] for d in (-0.01, 0.01)]
            assert near[0] - 1e-9 <= found <= near[1] + 1e-9
    assert mine.mean == pytest.approx((0.5 + 6.0) / 2)


# Keys


def test_the_key_changes_with_all_that_matters_and_with_nothing_else(tmp_path, data):
    def key(label="x", policy="fixed", options=None, seed=0, data=data, out=tmp_path / "out", cell=None, **changes):
        suite = Suite.from_dict(suite_of(data, **changes))
        setting = make_setting(suite, suite.scenarios["one"], out)
        options = {"weights": {"prose": 1.0}} if options is None else options
        return setting.cell(label, policy, options, seed, **(cell or {})).key

    train = suite_of(data)["train"]
    plain = key()
    shutil.copytree(data.parent, tmp_path / "moved")
    whole = Manifest.open(data)
    fewer = dataclasses.replace(whole.domain("code"), shards=whole.domain("code").shards[:1])
    dataclasses.replace(whole, domains=(whole.domain("prose"), fewer, whole.domain("maths"))).save(
        data.parent / "fewer.json"
    )
    assert key(label="y") == plain
    assert key(out=tmp_path / "elsewhere") == plain
    assert key(data=tmp_path / "moved" / "manifest.json") == plain
    assert key(feedback_every=3) == plain  # it is told nothing
    assert key(against="natural", seeds=[5, 6]) == plain
    changed = {
        "data": key(data=data.parent / "fewer.json"),
        "seed": key(seed=1),
        "policy": key(policy="natural", options={}),
        "options": key(options={"weights": {"code": 1.0}}),
        "steps": key(train={**train, "steps": 9}),
        "zero where none is the default": key(train={**train, "min_lr": 0.0}),
        "model": key(train={**train, "model": {**train["model"], "n_layer": 2}}),
        "base": key(base={"steps": 7}),
        "no base": key(base=None),
        "prior": key(prior={"policy": "natural"}),
        "fields": key(source=["prose"], other=["code"], probes=None),
        "order": key(source=["code", "prose"]),
        "probes": key(probes=["maths"]),
        "score": key(score_windows=3),
        "points": key(points=1),
        "feedback": key(cell={"feedback": True}),
        "cadence": key(cell={"feedback": True}, feedback_every=3),
        "kept": key(cell={"keep": True}),
    }
    assert len({plain, *changed.values()}) == len(changed) + 1
    assert key(preference=0.9) == plain  # a weight in the score, which is taken of the losses afterwards


def test_damaged_results_are_told_and_where_else_they_are(tmp_path):
    (tmp_path / "results.json").write_text('{"cells": [{"ke')
    with pytest.raises(StateError, match=r"is damaged .* remove it"):
        Results(tmp_path)


def test_the_base_in_a_file_counts_by_its_content(tmp_path, data):
    suite = Suite.from_dict(suite_of(data, base=str(tmp_path / "base.safetensors")))
    keys = []
    for content in (b"one", b"two", b"one"):
        (tmp_path / "base.safetensors").write_bytes(content)
        keys.append(make_setting(suite, suite.scenarios["one"], tmp_path).cell("x", "natural", {}, 0).key)
    assert keys[0] == keys[2] != keys[1]
    (tmp_path / "base.safetensors").unlink()
    with pytest.raises(StateError, match=r"cannot read .*base.safetensors"):
        make_setting(suite, suite.scenarios["one"], tmp_path).cell("x", "natural", {}, 0)


SOURCE = '''
"""Text."""
LIMIT = 3

def bound(x):
    """Bounded."""
    return min(x, LIMIT)  # by LIMIT

class Base:
    needs = frozenset()

class Own(Base):
    def decide(self, x):
        return bound(x)

class Neighbour:
    needs = frozenset({"loss"})
'''


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ("# by LIMIT", "# by the limit", True),
        ('"""Bounded."""', '"""At most LIMIT."""', True),
        ("return bound(x)", "return bound( x )", True),
        ('frozenset({"loss"})', 'frozenset({"feedback"})', True),
        ("LIMIT = 3", "LIMIT = 4", False),
        ("min(x", "max(x", False),
        ("needs = frozenset()", "needs = frozenset('x')", False),
        ("return bound(x)", "return bound(x) + 1", False),
    ],
)
def test_a_policys_digest_follows_what_it_is_made_of(tmp_path, monkeypatch, request, before, after, same):
    monkeypatch.syspath_prepend(str(tmp_path))
    number = request.node.callspec.indices["before"]
    digests = []
    for kind, text in (("one", SOURCE), ("two", SOURCE.replace(before, after))):
        assert kind == "one" or text != SOURCE
        # Of one module name, as it would be: the second stands where the first was.
        name = f"policy_source_{number}"
        (tmp_path / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        sys.modules.pop(name, None)
        sources._definitions.cache_clear()
        digests.append(source_digest(importlib.import_module(name).Own))
    assert (digests[0] == digests[1]) is same


def test_the_agents_digest_has_its_features_and_its_parameters(monkeypatch, tmp_path):
    pytest.importorskip("numba")
    from mixloader.agent.policy import Agent

    plain = source_digest(Agent)
    path, definitions = sources._definitions("mixloader.agent.features")
    changed = {**definitions, "make_features": definitions["_write_domain"]}
    real = sources._definitions
    monkeypatch.setattr(
        sources, "_definitions", lambda m: (path, changed) if m == "mixloader.agent.features" else real(m)
    )
    assert source_digest(Agent) != plain


# Suites


def entry(**values):
    return {"policies": {"x": values}, "against": "x"}


@pytest.mark.parametrize(
    ("match", "changes"),
    [
        ("unknown key sceneries; the nearest known key is scenarios", {"sceneries": {}}),
        ("scenarios.one: unknown key sauce; the nearest known key is source", {"scenarios": {"one": {"sauce": []}}}),
        ("scenarios.one: unknown key model.layers", {"scenarios": {"one": {"train": {"model": {"layers": 1}}}}}),
        ("train has seed, which the comparison sets itself", {"train": {"seed": 3}}),
        ("policies.x: unknown policy 'luck'; known policies are ", entry(policy="luck")),
        ("policies.x: policy 'fields' cannot be made with options", entry(policy="fields", options={"sauce": 1})),
        ("policies.x: policy 'dbl' cannot be made with options {}.*target_losses", entry(policy="dbl")),
        ("policies.x: unknown key option", entry(option={})),
        ("a scenario is called '../one'", {"scenarios": {"../one": {}}}),
        ("probe 'poetry' is no domain of source or target", {"probes": ["poetry"]}),
        ("domain 'prose' stands twice", {"target": ["prose"]}),
        ("target is empty", {"target": []}),
        ("preference is 1.5", {"preference": 1.5}),
        ("against is 'best'; the policies are half", {"against": "best"}),
        ("seeds are \\[1, 1\\]", {"seeds": [1, 1]}),
        ("points is 0", {"points": 0}),
        ("seeds is empty", {"seeds": []}),
        ("prepare.by is 'magic'; expected one of best_of", entry(prepare={"by": "magic"})),
        ("cannot be made with options {'sauce': 1}", entry(prepare={"by": "best_of", "sauce": 1})),
        ("mixtures is 0", entry(prepare={"by": "best_of", "mixtures": 0})),
        ("decides the policy", entry(policy="natural", prepare={"by": "best_of"})),
        ("seed 1000 is scored", {**entry(prepare={"by": "best_of"}), "seeds": [1000]}),
        ("unknown policy 'luck'", entry(policy="luck", prepare={"by": "reference", "option": "losses"})),
    ],
)  # fmt: skip
def test_a_mistake_in_a_suite_is_told_before_anything_runs(data, match, changes):
    with pytest.raises(ConfigError, match=match):
        Suite.from_dict(suite_of(data, **changes))


def test_domains_that_the_data_do_not_have_are_told_before_anything_runs(tmp_path, data, capsys):
    suite = write_suite(tmp_path / "suite.yaml", suite_of(data, source=["prose", "poetry"], probes=None))
    assert cli.main(["compare", str(suite), "--out", str(tmp_path / "out")]) == 2
    assert "unknown domain 'poetry'; the domains are prose, code, maths" in capsys.readouterr().err
    assert not (tmp_path / "out" / "runs").exists()


def test_the_preference_of_a_scenario_reaches_policies_that_have_one():
    pytest.importorskip("numba")
    assert Entry().options_for("agent", 0.8, {}) == {"preference": 0.8}
    assert Entry(options={"preference": 0.1}).options_for("agent", 0.8, {}) == {"preference": 0.1}
    assert Entry().options_for("fixed", 0.8, {"weights": {"a": 1.0}}) == {"weights": {"a": 1.0}}


def test_the_suites_that_come_with_it_are_sound():
    Suite.load(ROOT / "examples" / "compare.yaml")
    pytest.importorskip("mixloader.fitters")
    Suite.load(ROOT / "bench" / "compare.yaml")
