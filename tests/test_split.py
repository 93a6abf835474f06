"""What the agent may be trained on: disjoint from the scoreboard, drawn the same way every time, and wide enough."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from collecting import tiny_split

from mixloader.agent.episode import draw_episode
from mixloader.agent.split import SHIPPED, Split
from mixloader.agent.topics import cut_into_topics
from mixloader.errors import ConfigError
from mixloader.observation import DomainTable
from mixloader.policies import make_policy

ROOT = Path(__file__).parent.parent
SCOREBOARD = ROOT / "bench" / "scoreboard.yaml"


@pytest.fixture(scope="module")
def split():
    return Split.load()


@pytest.fixture(scope="module")
def episodes(split):
    return [draw_episode(split, number) for number in range(split.episodes)]


def test_folds_and_the_scoreboards_corpora_are_disjoint(split):
    groups = [set(split.scoreboard), *(set(fold.corpora) for fold in split.folds.values())]
    for i, group in enumerate(groups):
        for other in groups[i + 1 :]:
            assert not group & other
    with pytest.raises(ConfigError, match=r"corpus 'sums' is of fold .* and of"):
        tiny_split(scoreboard=["sums"])


def test_no_scenario_of_the_scoreboard_has_a_domain_that_the_shipped_agent_has_seen(split):
    split.check_scoreboard({"code": ["python-0", "c", "prose"], "proofs": ["coq", "word_problems"]})
    for seen in ("metamath", "metamath-2", "encyclopedia-0"):
        with pytest.raises(ConfigError, match=f"scenario 'maths' has domain '{seen}'"):
            split.check_scoreboard({"maths": ["coq", seen]})
    split.check_scoreboard(named_by(SCOREBOARD))


def test_the_reverse_has_no_domain_of_the_fold_that_its_agent_is_fitted_to(split):
    reverse = named_by(SCOREBOARD.with_name("scoreboard_reverse.yaml"))
    Split(**{**yaml.safe_load(SHIPPED.read_text()), "shipped": "code"}).check_scoreboard(reverse)
    with pytest.raises(ConfigError, match="which the agent was trained on"):
        split.check_scoreboard(reverse)


def named_by(suite):
    """The domains that each scenario of a suite names."""
    return {
        name: [domain for key in ("source", "target", "other") for domain in scenario.get(key, ())]
        for name, scenario in yaml.safe_load(suite.read_text())["scenarios"].items()
    }


def test_an_episode_is_a_function_of_split_and_number(split, episodes):
    assert [draw_episode(split, number) for number in (200, 3)] == [episodes[200], episodes[3]]
    with pytest.raises(ConfigError, match="there is no episode 384"):
        draw_episode(split, 384)


def test_there_are_as_many_trajectories_and_feedbacks_as_in_the_paper(split, episodes):
    """arXiv 2507.15640: 384 trajectories, 27,266 feedbacks."""
    feedbacks = [e.schedule["steps"] // e.schedule["eval_every"] + 1 for e in episodes]
    assert len(episodes) >= 384
    assert sum(feedbacks) >= 27_000
    assert min(feedbacks) >= 41
    assert max(feedbacks) <= 81
    assert len({e.architecture for e in episodes}) >= 3
    by_fold = {name: sum(e.fold == name for e in episodes) for name in split.folds}
    assert by_fold == {"maths": 288, "code": 96}


def test_episodes_draw_from_their_fold_alone(split, episodes):
    for episode in episodes:
        fold = split.folds[episode.fold]
        pools = {"source": fold.source, "target": fold.target}
        for domain in episode.domains:
            allowed = pools.get(domain.field or "", fold.corpora)
            assert all(topic in split.topics_of(topic.rpartition("-")[0]) for topic in domain.topics)
            assert {topic.rpartition("-")[0] for topic in domain.topics} <= set(allowed)


def test_domains_are_few_and_many_small_and_large_and_partly_probed(episodes):
    sizes = [len(e.domains) for e in episodes]
    assert (min(sizes), max(sizes)) == (2, 16)
    assert sizes.count(2) > 30, "source and target alone: the commonest case"
    for episode in episodes:
        names = [domain.name for domain in episode.domains]
        topics = [topic for domain in episode.domains for topic in domain.topics]
        assert len(set(names)) == len(names)
        assert len(set(topics)) == len(topics), "no text is in two domains"
        for field in ("source", "target"):
            assert any(domain.probed for domain in episode.domains if domain.field == field)
        assert not any(domain.probed for domain in episode.domains if domain.field is None)
    domains = [domain for episode in episodes for domain in episode.domains]
    assert sum(not domain.probed for domain in domains if domain.field) > len(domains) / 6
    assert any(domain.share < 0.1 for domain in domains)
    assert any(domain.field is None for domain in domains)


def test_a_fifth_of_the_behaviours_and_more_are_policies_of_the_repository(episodes):
    kinds = [e.behaviour.policy for e in episodes]
    own = [kind for kind in kinds if kind not in ("walk", "perturbed", "piecewise", "linear")]
    assert len(own) >= len(kinds) / 5
    assert kinds.count("perturbed") > 30
    assert len(set(own)) >= 10


def test_every_behaviour_can_be_made_for_the_domains_of_its_episode(episodes):
    for episode in episodes:
        size = len(episode.domains)
        fields = tuple(episode.fields.values())
        table = DomainTable(tuple(episode.fields), fields, (None,) * size, np.full(size, 9999), np.full(size, 1 / size))
        first = make_policy(episode.behaviour.policy, **episode.behaviour.options).reset(table)
        assert first is None or (len(first) == size and min(first) >= 0)


def test_topics_hold_every_document_once_and_none_is_much_larger_than_its_share():
    rng = np.random.default_rng(0)
    words = [["cat dog", "sun moon", "red blue"][k] for k in rng.choice(3, 90, p=[0.5, 0.25, 0.25])]
    documents = [f"{word} " * int(rng.integers(5, 30)) + str(i) for i, word in enumerate(words)]
    topics = cut_into_topics(documents, 3, seed=1)
    assert sorted(text for topic in topics for text in topic) == sorted(documents)
    sizes = [sum(map(len, topic)) for topic in topics]
    assert max(sizes) <= 1.25 * sum(sizes) / 3 + max(map(len, documents))
    assert topics == cut_into_topics(documents, 3, seed=1)
    homes = {word: {k for k, topic in enumerate(topics) for text in topic if word in text} for word in ("cat", "sun")}
    assert len(homes["sun"]) == 1, "a small cluster is kept together"
    assert len(homes["cat"]) > 1, "a large one is cut"


def test_a_split_that_names_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="names a fold 'maths'; its folds are only"):
        tiny_split(pattern=["maths"])
    with pytest.raises(ConfigError, match="no source or no target"):
        tiny_split(folds={"only": {"source": [], "target": ["sums"]}})
    path = tmp_path / "split.yaml"
    path.write_text("name: x\nsize: 3\n")
    with pytest.raises(ConfigError, match=r"split.yaml is no split: .*'size'"):
        Split.load(path)


def test_digests_tell_splits_apart_but_for_what_is_only_said(split):
    assert split.digest == Split.load().digest
    assert tiny_split().digest != tiny_split(seed=6).digest
    assert tiny_split().digest == tiny_split(corpora={"sums": {"topics": 3, "licence": "else"}}).digest
