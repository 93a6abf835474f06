"""Comparisons: what a score is made of, what is cached, and that a comparison that was stopped ends as any other."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from comparing import suite_of, write_suite
from tiny_run import FIELDS, tiny_data

from mixloader.compare import run
from mixloader.compare.comparison import Comparison, Row
from mixloader.compare.preparations import BestOf, Reference, mixtures_around
from mixloader.compare.runner import compare
from mixloader.compare.suite import Suite
from mixloader.compare.table import table
from mixloader.errors import StateError
from mixloader.record import read_record
from mixloader.workers import attempt

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The folder and the output of a comparison that nobody stopped, and the Comparison."""
    folder = tmp_path_factory.mktemp("compare")
    path = write_suite(folder / "suite.yaml", suite_of(data))
    with redirect_stdout(StringIO()) as printed:
        assert run.main([str(path), "--out", str(folder / "out"), "--workers", "2"]) == 0
    return folder / "out", printed.getvalue(), compare(Suite.load(path), folder / "out")


@pytest.fixture
def in_process(monkeypatch):
    """Runs of the test go here, one after the other: processes take seconds to start."""

    class Here:
        def __init__(self, function):
            self.function = function

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

        def run(self, jobs):
            return (attempt(self.function, index, job) for index, job in enumerate(jobs))

    threads = torch.get_num_threads()
    monkeypatch.setattr("mixloader.compare.runner.make_workers", lambda function, count, engine: Here(function))
    yield
    torch.set_num_threads(threads)


# Runs, from the suite to the table


def test_every_policy_runs_with_every_seed_in_every_scenario_on_equal_tokens(finished):
    _, _, comparison = finished
    assert {(row.scenario, row.policy, row.seed) for row in comparison.rows} == set(
        itertools.product(["one", "two"], ["half", "natural", "told", "oracle"], [0, 1])
    )
    assert {row.result["tokens"] for row in comparison.rows} == {8 * 2 * 16}
    for row in comparison.rows:
        assert [point["tokens"] for point in row.result["points"]] == [0, 128, 256]
        assert sum(row.result["read"].values()) == 256


def test_the_table_says_what_the_results_say(finished):
    out, printed, comparison = finished
    text = (out / "table.md").read_text()
    assert text in printed
    assert (out / "compare.png").stat().st_size > 10_000
    rows = {line.split("|")[1].strip(): line.split("|") for line in text.split("\n\n")[0].splitlines()}
    cells = {(r.scenario, r.policy, r.seed): r.result["points"][-1]["losses"] for r in comparison.rows}
    for policy in ("half", "natural", "told", "oracle"):
        one = [0.5 * (x["prose"] + x["code"]) / 2 + 0.5 * x["maths"] for x in (cells["one", policy, s] for s in (0, 1))]
        two = [0.8 * x["code"] + 0.2 * x["maths"] for x in (cells["two", policy, s] for s in (0, 1))]
        assert float(rows[policy][2]) == pytest.approx((np.mean(one) + np.mean(two)) / 2, abs=6e-4)
    # Only scenario one has a source domain without a probe.
    unprobed = np.mean([cells["one", "half", s]["code"] for s in (0, 1)])
    assert float(rows["half"][5]) == pytest.approx(unprobed, abs=6e-4)
    assert [rows[policy][-2].strip() for policy in ("half", "natural", "told", "oracle")] == [
        "",
        "",
        "feedback",
        "the score",
    ]
    for name, field in FIELDS.items():
        assert f"{name} ({field}" in text


def test_the_search_of_the_oracle_is_its_cost_and_chooses_by_the_score_of_other_seeds(finished):
    _, _, comparison = finished
    assert {row.extra_tokens for row in comparison.rows_of("oracle")} == {3 * 256}
    assert {row.extra_tokens for row in comparison.rows_of("half")} == {0}
    assert [tokens for tokens, _ in comparison.curve("oracle")] == [768, 768 + 128, 768 + 256]
    assert [tokens for tokens, _ in comparison.curve("half")] == [0, 128, 256]
    assert "768" in table(comparison)
    setting = comparison.settings["one"]
    tried = []
    for i, mixture in enumerate(mixtures_around(setting.table, 3, 1000)):
        weights = dict(zip(setting.table.names, map(float, mixture), strict=True))
        tried.append(setting.cell(f"oracle {i}", "fixed", {"weights": weights}, 1000))
    ends = [json.loads((cell.out / "cell.json").read_text())["points"][-1]["losses"] for cell in tried]
    best = min(range(3), key=lambda i: setting.summary(ends[i])["balanced"])
    ran = next(row.result for row in comparison.rows_of("oracle") if row.scenario == "one")
    record = read_record(tried[best].out.parent / ran["key"] / "record.jsonl")
    assert record.header["policy"]["options"] == tried[best].config["policy_options"]
    assert record.header["seed"] == 0


def test_what_is_finished_is_not_run_again_and_needs_no_checkpoint(
    finished, tmp_path, data, monkeypatch, capsys, in_process
):
    out, printed, _ = finished
    suite = write_suite(tmp_path / "suite.yaml", suite_of(data))
    monkeypatch.setattr("mixloader.compare.runner.run_cell", None)
    assert run.main([str(suite), "--out", str(out)]) == 0
    assert capsys.readouterr().out == printed
    # The results alone, elsewhere, as they would be committed.
    (tmp_path / "out").mkdir()
    shutil.copy(out / "results.json", tmp_path / "out")
    assert run.main([str(suite), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "table.md").read_text() == (out / "table.md").read_text()
    assert (tmp_path / "out" / "results.json").read_text() == (out / "results.json").read_text()
    # Against another of its policies: the same runs, other differences.
    capsys.readouterr()
    assert run.main([str(suite), "--out", str(tmp_path / "out"), "--against", "natural"]) == 0
    printed_now = capsys.readouterr().out
    assert "minus natural [95 %]" in printed_now
    assert next(row for row in printed_now.splitlines() if row.startswith("| natural ")).split("|")[3].strip() == ""


def test_killed_in_the_middle_it_runs_what_is_missing_and_ends_the_same(finished, tmp_path, data, in_process):
    out, suite = tmp_path / "out", write_suite(tmp_path / "suite.yaml", suite_of(data))
    command = [sys.executable, "-m", "mixloader", "compare", str(suite), "--out", str(out), "--workers", "1"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": str(ROOT)})
        deadline = time.monotonic() + 200
        while len(list(out.glob("runs/*/cell.json"))) < 5:
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (out / "results.json").exists()
    _wait_for_the_dead(out)
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/cell.json")}
    assert len(before) < len(list(finished[0].glob("runs/*/cell.json")))
    with redirect_stdout(StringIO()):
        assert run.main([str(suite), "--out", str(out)]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (out / "table.md").read_text() == (finished[0] / "table.md").read_text()
    # Bit for bit: the same suite gives the same numbers, whoever runs it.
    mine, theirs = (json.loads((folder / "results.json").read_text())["cells"] for folder in (out, finished[0]))
    assert mine == theirs


def _wait_for_the_dead(out):
    """The worker of a killed comparison ends by itself, and leaves the lock of the run that it was at."""
    import fcntl

    deadline = time.monotonic() + 60
    for path in out.glob("runs/*/.lock"):
        with path.open("w") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    assert time.monotonic() < deadline, "a worker outlives the comparison"
                    time.sleep(0.01)


def test_a_run_that_fails_is_marked_and_the_others_go_on(finished, tmp_path, data, capsys, in_process):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    values = suite_of(data)
    values["policies"]["broken"] = {"policy": "fixed", "options": {"weights": {"prose": 1, "poetry": 1}}}
    suite = write_suite(tmp_path / "suite.yaml", values)
    assert run.main([str(suite), "--out", str(out), "--workers", "1"]) == 1
    printed = capsys.readouterr().out
    assert "† failed: one, broken, seed 0: unknown domain 'poetry'" in printed
    assert "4 of 20 runs failed" in printed
    text = (out / "table.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("| broken †")]
    for line in (finished[0] / "table.md").read_text().split("\n\n")[0].splitlines()[2:]:
        assert " ".join(line.split()) in " ".join(text.split())


def test_a_base_model_that_fails_fails_what_starts_from_it(tmp_path, data, in_process):
    values = suite_of(data, base={"steps": 6, "model": {"n_embd": 8}}, scenarios={"one": {}})
    comparison = compare(Suite.from_dict(values), tmp_path, workers=1, progress=False)
    assert "its preparation failed" in next(row.error for row in comparison.rows_of("oracle"))
    assert all("of shape" in row.error for row in comparison.rows)
    assert "no run ended" in table(comparison)


def test_reference_losses_are_those_of_the_end_of_a_run_and_its_tokens_are_the_cost(
    tmp_path, data, monkeypatch, in_process
):
    given = {}
    prepare = {"by": "reference", "option": "weights", "train": {"steps": 12}}
    values = suite_of(
        data, seeds=[0], scenarios={"one": {}}, against="after",
        policies={"after": {"policy": "fixed", "prepare": prepare}},
    )  # fmt: skip
    monkeypatch.setattr(
        Reference, "options", lambda self, setting, results: given.update(results[0]["late"]) or {"weights": given}
    )
    comparison = compare(Suite.from_dict(values), tmp_path, workers=1, progress=False)
    (row,) = comparison.rows
    assert row.extra_tokens == 12 * 2 * 16
    setting = comparison.settings["one"]
    (cell,) = Reference("weights", train={"steps": 12}).runs(setting, "after")
    decisions = read_record(cell.out / "record.jsonl").decisions
    assert len(decisions) == 12
    for d, name in enumerate(setting.training.names):
        read = [(line["loss"][d], line["loss_tokens"][d]) for line in decisions[-3:] if line["loss_tokens"][d]]
        assert given[name] == pytest.approx(sum(x * n for x, n in read) / sum(n for _, n in read), rel=1e-9)


def test_a_law_is_fitted_to_proxies_on_the_feedback_text_and_their_tokens_are_the_cost(tmp_path, data, in_process):
    fitters = pytest.importorskip("mixloader.fitters")
    prepare = {"by": "fit", "method": "linear", "mixtures": 12, "train": {"steps": 3}}
    values = suite_of(
        data, seeds=[0], against="linear", policies={"linear": {"prepare": prepare}},
        scenarios={"one": {"preference": 0.8}},
    )  # fmt: skip
    comparison = compare(Suite.from_dict(values), tmp_path, progress=False)
    (row,) = comparison.rows
    assert (row.extra_tokens, row.sees) == (12 * 3 * 2 * 16, "feedback")
    setting = comparison.settings["one"]
    cells = Suite.from_dict(values).preparation("linear").runs(setting, "linear")
    mixtures = [list(cell.config["policy_options"]["weights"].values()) for cell in cells]
    ends = [json.loads((cell.out / "cell.json").read_text())["feedback"] for cell in cells]
    assert not any(json.loads((cell.out / "cell.json").read_text())["points"] for cell in cells), "proxies are scored"
    law = fitters.fit("linear", mixtures, [[end["prose"], end["maths"]] for end in ends], seed=1000)
    limits = {"tokens": setting.table.tokens, "target_tokens": 256}
    expected = fitters.propose(law, setting.table.prior, [0.8, 0.2], **limits)
    ran = read_record(tmp_path / "runs" / row.result["key"] / "record.jsonl").header["policy"]
    assert ran["name"] == "fixed"
    assert list(ran["options"]["weights"].values()) == pytest.approx(list(expected))


def test_two_comparisons_in_one_folder_are_refused(tmp_path, data):
    import fcntl

    suite = write_suite(tmp_path / "suite.yaml", suite_of(data))
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(StateError, match="another comparison works in"):
            run.main([str(suite), "--out", str(tmp_path)])


def test_without_matplotlib_all_but_the_picture_is_there(finished, tmp_path, data, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    suite = write_suite(tmp_path / "suite.yaml", suite_of(data))
    assert run.main([str(suite), "--out", str(finished[0])]) == 0
    assert "pip install 'mixloader[plot]'" in capsys.readouterr().out


def test_a_run_of_this_version_ends_with_these_losses(finished):
    """Results are used again by RESULTS_VERSION: whoever changes what a run ends with raises it, and these figures."""
    _, _, comparison = finished
    row = next(r for r in comparison.rows if (r.scenario, r.policy, r.seed) == ("one", "half", 1))
    expected = {"prose": GOLDEN[0], "code": GOLDEN[1], "maths": GOLDEN[2]}
    assert row.result["points"][-1]["losses"] == pytest.approx(expected, abs=2e-3)


GOLDEN = (3.8093, 3.2470, 3.7068)


def test_pairs_are_of_the_same_scenario_and_seed_and_a_lone_run_counts_for_nothing(finished):
    _, _, whole = finished
    suite, settings = whole.suite, {"one": whole.settings["one"]}

    def row(policy, seed, loss):
        losses = dict.fromkeys(("prose", "code", "maths"), loss)
        result = {"points": [{"tokens": 0, "losses": losses}] * 2, "policy_errors": 0, "tokens": 1, "read": losses}
        return Row("one", policy, seed, 0, "", None if loss is None else result, "boom" if loss is None else None)

    rows = [row("half", 0, 1.0), row("half", 1, 10.0), row("natural", 0, 1.5), row("natural", 1, None)]
    comparison = Comparison(suite, settings, rows, [])
    assert comparison.difference("natural").mean == pytest.approx(0.5)
    assert comparison.mean("natural", "balanced") == pytest.approx(1.5)
    assert comparison.failures() == [rows[3]]


def test_mixtures_that_are_tried_cover_the_shares_of_the_fields(finished):
    setting = finished[2].settings["two"]  # code, maths, and prose without a field
    mixtures = mixtures_around(setting.table, 50, 0)
    assert mixtures.shape == (50, 3)
    np.testing.assert_allclose(mixtures.sum(axis=1), 1)
    assert (mixtures >= 0).all()
    shares = mixtures[:, 0] / mixtures[:, :2].sum(axis=1)
    assert np.diff(np.sort([0, *shares, 1])).max() < 0.04  # an even spread would have 0.02
    assert mixtures[:, 2].min() >= 0
    assert mixtures[:, 2].max() < 1 / 6
    np.testing.assert_array_equal(mixtures[:20], mixtures_around(setting.table, 20, 0))
    assert len(BestOf(4, [7, 8]).runs(setting, "oracle")) == 8
