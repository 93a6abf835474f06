"""`python -m bench.agent_pictures`: what it plays, what it shares with the scoreboard, and that it draws."""

import numpy as np
import pytest
import torch
from collecting import Here
from comparing import suite_of
from tiny_run import VOCAB_SIZE, tiny_data

from bench import agent_pictures as pictures
from bench.agent_pictures import Mixtures, draw_intervals, draw_planted, draw_preferences, total_variation
from mixloader.compare.runner import compare
from mixloader.compare.suite import Suite
from mixloader.config import read_yaml
from mixloader.errors import MixLoaderError
from mixloader.formats import read_tokens
from mixloader.manifest import Manifest

pytest.importorskip("matplotlib")

FIELDS = {"a": "source", "b": "source", "c": "target", "d": None}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """The folder of a scoreboard's data, whose domains are those of tiny_data."""
    tiny_data(tmp_path / "data").rename(tmp_path / "data" / "board.json")
    for name, value in (("KEPT", ("prose", "code")), ("LEARNED", "maths"), ("OWN_SHARDS", 1)):
        monkeypatch.setattr(pictures, name, value)
    return tmp_path / "data"


@pytest.fixture
def in_process(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr("mixloader.compare.runner.make_workers", Here)
    yield
    torch.set_num_threads(threads)


def path_of(*rows, fields=FIELDS):
    weights = np.array([*rows, rows[-1]], dtype=np.float64)
    return Mixtures(np.linspace(0, 1000, len(weights)), weights, fields)


# What is run


@pytest.mark.slow
def test_runs_that_the_scoreboard_has_are_not_run_again_and_its_results_stay(data, tmp_path, in_process):
    shared = suite_of(data / "board.json", scenarios={"one": {}}, seeds=[0], policies={"agent": None}, against="agent")
    compare(Suite.from_dict(shared), tmp_path / "runs")
    before = (tmp_path / "runs" / "results.json").read_bytes()
    ran = {path.parent.name for path in tmp_path.glob("runs/runs/*/cell.json")}
    found = pictures.play(pictures.preferences_suite(shared), tmp_path / "runs", 1)
    now = {path.parent.name for path in tmp_path.glob("runs/runs/*/cell.json")}
    assert len(now - ran) == len(pictures.PREFERENCES) - 1, "the preference of the scoreboard was there"
    assert (tmp_path / "runs" / "results.json").read_bytes() == before
    assert list(found) == [("one", f"{value:g}") for value in pictures.PREFERENCES]
    assert len({mixtures.weights.tobytes() for mixtures in found.values()}) == len(found)
    for mixtures in found.values():
        assert mixtures.tokens[[0, -1]].tolist() == [0, 8 * 2 * 16]
        np.testing.assert_allclose(mixtures.weights.sum(axis=1), 1.0)


def test_a_run_that_fails_is_told(data, tmp_path, in_process, monkeypatch):
    def fail(cell):
        raise MixLoaderError("no luck")

    monkeypatch.setattr("mixloader.compare.runner.run_cell", fail)
    values = suite_of(data / "board.json", scenarios={"one": {}})
    with pytest.raises(MixLoaderError, match=r"one, 0.2: .*no luck"):
        pictures.play(pictures.preferences_suite(values), tmp_path / "runs", 1)


def test_planted_domains_are_more_of_the_target_and_noise(data):
    pictures.planted_data(data)
    board = Manifest.open(data / "board.json")
    without, useful, useless = (
        Manifest.open(data / f"planted_{name}.json") for name in ("without", "useful", "useless")
    )
    assert without.names == ("prose", "code", "maths")
    assert useful.names == useless.names == (*without.names, "planted")
    for manifest in (without, useful, useless):
        assert manifest.domains[:2] == board.domains[:2]
        assert manifest.domain("maths").shards == board.domain("maths").shards[:1]
    assert useful.domain("planted").shards == board.domain("maths").shards[1:]
    assert useless.domain("planted").tokens == useful.domain("planted").tokens
    (noise,) = useless.domain("planted").shards
    counts = np.bincount(read_tokens(noise, 0, noise.tokens), minlength=VOCAB_SIZE)
    assert counts.max() < 3 * counts.mean()
    suite = pictures.planted_suite(read_yaml(pictures.SCOREBOARD), data)
    assert [scenario.fields.get("planted", "none") for scenario in suite.scenarios.values()] == ["none", None, None]
    for scenario in suite.scenarios.values():
        assert sum(scenario.prior["options"]["weights"].values()) == pytest.approx(1)


def test_the_scoreboard_is_played_with_every_preference_and_interval():
    scoreboard = read_yaml(pictures.SCOREBOARD)
    suite = pictures.preferences_suite(scoreboard)
    assert list(suite.scenarios) == list(scoreboard["scenarios"])
    assert [entry.options["preference"] for entry in suite.policies.values()] == [0.2, 0.5, 0.8]
    suite = pictures.intervals_suite(scoreboard)
    assert [entry.train["decide_every"] for entry in suite.policies.values()] == [1, 2, 4]
    assert scoreboard["train"]["decide_every"] in pictures.INTERVALS, "one of them is there already"


# What is drawn


def test_total_variation_is_over_time():
    one, other = path_of([1, 0, 0, 0], [0.5, 0.5, 0, 0]), path_of([0, 1, 0, 0], [0.5, 0.5, 0, 0])
    assert total_variation(one, one) == 0
    assert total_variation(one, other) == pytest.approx(0.5), "1 in the first half, 0 in the second"
    slower = Mixtures(np.array([0.0, 1000.0]), np.array([[1.0, 0, 0, 0]] * 2), FIELDS)
    assert total_variation(one, slower) == pytest.approx(0.25)


def test_shares_of_fields_add_up_domains():
    shares = path_of([0.1, 0.2, 0.3, 0.4]).by_field()
    assert shares.fields == {"source": "source", "target": "target", "other": None}
    np.testing.assert_allclose(shares.weights[0], [0.3, 0.3, 0.4])


def texts(figure):
    axes = figure.axes
    return " ".join(
        [
            figure.get_suptitle(),
            *(panel.get_title(loc="left") for panel in axes),
            *(t.get_text() for p in axes for t in p.texts),
        ]
    )


@pytest.fixture
def drawn(monkeypatch):
    """Figures that were drawn."""
    figures = []
    make = pictures._figure
    monkeypatch.setattr(pictures, "_figure", lambda *size: figures.append(make(*size)) or figures[-1])
    return figures


def test_pictures_say_what_they_show(tmp_path, drawn):
    many = {f"d{i}": "source" if i % 2 else "target" for i in range(30)}
    found = {("few", "0.2"): path_of([0.1, 0.2, 0.3, 0.4]), ("many", "0.2"): path_of([1 / 30] * 30, fields=many)}
    draw_preferences(found, tmp_path / "preferences.png")
    assert "λ = 0.2: 30% source at the end" in texts(drawn[-1])
    labels = [{text.get_text() for text in panel.texts} for panel in drawn[-1].axes]
    assert labels == [set(FIELDS), {"source", "target"}], "by field where domains are many"
    fields = {"prose": "source", "python": "target"}
    with_planted = path_of([0.4, 0.4, 0.2], [0.3, 0.2, 0.5], fields={**fields, "planted": None})
    found = {("without", "agent"): path_of([0.5, 0.5], fields=fields)}
    found |= {(name, "agent"): with_planted for name in ("useful", "useless")}
    draw_planted(found, tmp_path / "planted.png")
    assert "planted: random tokens, 20% → 50%" in texts(drawn[-1])
    two, four = path_of([0.1, 0.2, 0.3, 0.4]), path_of([0.1, 0.2, 0.4, 0.3])
    draw_intervals({("code", "1"): two, ("code", "2"): two, ("code", "4"): four}, tmp_path / "intervals.png")
    assert "1 and 2: 0.000, 2 and 4: 0.100" in texts(drawn[-1])
    for name in ("preferences", "planted", "intervals"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
