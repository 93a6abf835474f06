"""The report against runs whose numbers are known."""

import json
import math
import re
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from mixloader import report
from mixloader.errors import RecordError
from mixloader.mixture import as_fractions, quantize
from mixloader.record import Recorder, read_record

DOMAINS = {"code": "source", "prose": "source", "legal": "source", "algebra": "target", "riddles": "target"}
HALF = {"name": "fields", "options": {"source": 0.5}}
AGENT = {"name": "agent", "options": {}}


def write_run(folder: Path, policy: dict, seed: int, steps: int = 60, *, shift: float = 0.0, fields=DOMAINS) -> Path:
    """A run of 4 x 32 tokens a step. The weight of the first domain rises by what the others lose."""
    n = len(fields)
    rng = np.random.default_rng(seed)
    header = {
        "manifest": "f" * 64, "seed": seed, "global_batch": 4, "batch_size": 4, "seq_len": 32, "step": 0,
        "domains": list(fields), "fields": list(fields.values()), "weights": quantize(np.ones(n)), "policy": policy,
    }  # fmt: skip
    with closing(Recorder(folder / "record.jsonl", header)) as record:
        for step in range(steps):
            weights = np.ones(n)
            weights[0] += step / 20
            read = rng.integers(0, 3, n)
            loss = np.where(read > 0, np.linspace(2, 4, n) - step / steps, np.nan)
            record.decision(
                step=step, effect=step + 2, tokens=(step + 1) * 128, weights=quantize(weights),
                counts=read, loss=loss, loss_tokens=read * 32,
            )  # fmt: skip
        record.event("end", step=steps)
    before = dict.fromkeys(fields, 4.0)
    after = {name: 3.0 + i / 10 + seed / 100 + shift for i, name in enumerate(fields)}
    (folder / "result.json").write_text(json.dumps({"losses_before": before, "losses_after": after}))
    return folder


@pytest.fixture
def runs(tmp_path):
    for seed in (0, 1, 2):
        write_run(tmp_path / f"half-{seed}", HALF, seed)
        write_run(tmp_path / f"agent-{seed}", AGENT, seed, shift=-0.05 + seed / 100)
    return [report.load_run(folder) for folder in report.find_runs([tmp_path])]


def row(text: str, title: str) -> list[float]:
    line = next(line for line in text.splitlines() if line.strip().startswith(title))
    return [float(number) for number in re.findall(r"-?\d+\.\d+", line)]


def test_table_means_and_spreads(runs):
    text = report.table(runs)
    # Folders are read by name, so the agent's column is the first; half and half ends at 3.01 + i / 10 on average.
    assert row(text, "code") == [4.0, 2.97, 0.02, 3.01, 0.01]
    assert row(text, "source mean") == [4.0, 3.07, 0.02, 3.11, 0.01]
    assert row(text, "target mean") == [4.0, 3.32, 0.02, 3.36, 0.01]
    assert row(text, "balanced mean") == [4.0, 3.195, 0.02, 3.235, 0.01]
    assert "over 3 seeds" in text


def test_table_compares_seed_by_seed(runs):
    text = report.table(runs)
    # mean, its standard error (0.01 / sqrt(3)), and each seed's difference
    for key in ("source", "target", "balanced"):
        line = next(line for line in text.splitlines() if line.startswith(f"  {key} "))
        assert [float(x) for x in re.findall(r"-?\d+\.\d+", line)] == [-0.04, 0.0058, -0.05, -0.04, -0.03]


def test_a_single_run_without_fields_has_no_spread_and_no_comparison(tmp_path):
    folder = write_run(tmp_path / "run", {"name": "natural", "options": {}}, 0, fields={"a": None, "b": None})
    text = report.table([report.load_run(folder)])
    assert row(text, "other mean") == [4.0, 3.05]
    assert "±" not in text
    assert "minus" not in text


@pytest.mark.parametrize(
    ("policy", "label"),
    [
        ({"name": "fields", "options": {"source": 0.0}}, "target only"),
        (HALF, "half and half"),
        ({"name": "fields", "options": {"source": 0.25}}, "25% source"),
        ({"name": "agent", "options": {"preference": 0.8}}, "agent preference=0.8"),
        ({"name": "natural"}, "natural"),
    ],
)
def test_policies_in_words(policy, label):
    assert report.policy_label(policy) == label


def test_mixture_over_time_is_what_the_record_says_was_in_force(runs):
    record = runs[0].record
    tokens, weights = report.mixture_over_time(record)
    for step in range(60):
        at = np.searchsorted(tokens, step * 128, side="right") - 1
        np.testing.assert_array_equal(weights[at], as_fractions(record.units_at(step)))
    assert tokens[-1] == 60 * 128


def test_losses_over_time_are_means_over_the_tokens_nearby(runs):
    record = runs[0].record
    tokens, losses = report.losses_over_time(record, points=7, width=0.1)
    assert losses.shape == (7, len(DOMAINS))
    assert (tokens[0], tokens[-1]) == (128, 60 * 128)
    for at, values in zip(tokens, losses, strict=True):
        for i, value in enumerate(values):
            total = read = 0.0
            for d in record.decisions:
                near = math.exp(-0.5 * ((d["tokens"] - at) / (0.1 * 60 * 128)) ** 2) * d["loss_tokens"][i]
                total, read = total + near * (d["loss"][i] or 0), read + near
            assert value == pytest.approx(total / read)


def test_a_long_run_is_summed_up_without_losing_a_token(tmp_path):
    record = read_record(write_run(tmp_path / "run", HALF, 0, steps=2500) / "record.jsonl")
    _, losses = report.losses_over_time(record, points=1, width=1e6)
    for i in range(len(DOMAINS)):
        total = sum(d["loss"][i] * d["loss_tokens"][i] for d in record.decisions if d["loss_tokens"][i])
        assert losses[0, i] == pytest.approx(total / sum(d["loss_tokens"][i] for d in record.decisions))


def test_a_domain_that_was_never_read_has_no_loss(tmp_path):
    record = read_record(write_run(tmp_path / "run", HALF, 0) / "record.jsonl")
    for decision in record.decisions:
        decision["loss"][1], decision["loss_tokens"][1] = None, 0
    _, losses = report.losses_over_time(record)
    assert np.isnan(losses[:, 1]).all()
    assert np.isfinite(losses[:, 0]).all()


def test_picture_is_a_png_that_shows_something(runs, tmp_path):
    from matplotlib.image import imread

    pixels = imread(report.draw(runs, tmp_path / "report.png"))
    assert min(pixels.shape[:2]) > 800
    for field, hue in report.colours(dict(DOMAINS)).items():
        painted = np.abs(pixels[..., :3] - np.array(hue[:3])).max(axis=-1) < 0.02
        assert painted.sum() > 500, field


def test_one_run_without_matplotlib_says_which_extra_has_it(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RecordError, match=r"pip install 'mixloader\[plot\]'"):
        report.draw(runs[:1], tmp_path / "report.png")


def test_main_reports_a_folder_of_runs(runs, tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "balanced mean" in printed
    assert str(tmp_path / "report.png") in printed
    assert (tmp_path / "report.png").stat().st_size > 10_000


@pytest.mark.parametrize("damage", ["missing", "{", "[]"])
def test_folders_that_are_no_finished_run(tmp_path, damage):
    folder = write_run(tmp_path / "run", HALF, 0)
    result = folder / "result.json"
    if damage == "missing":
        result.unlink()
    else:
        result.write_text(damage)
    with pytest.raises(RecordError, match=r"no readable result\.json"):
        report.load_run(folder)
    with pytest.raises(RecordError, match="no run"):
        report.find_runs([tmp_path / "nothing"])
