"""`python -m bench.gpu` and `python -m bench.loss`, gone through in tiny sizes on the CPU."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench import gpu, gpu_kernel, gpu_training, loss, loss_head, loss_plain
from bench.budgets import Budget, table


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_without_a_gpu_it_says_so_and_ends(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    said = capsys.readouterr().out
    assert "needs a CUDA device" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("part", "figures"),
    [
        ("kernel", []),
        ("loss", []),
        ("training", []),
        ("ab", ["steps a side", "95 % interval, %", "share of the time in next(), %"]),
        ("influence", ["ms of a plain step", "a step with a probe takes more, ms"]),
        ("tune", []),
    ],
)
def test_every_part_can_be_rehearsed(tmp_path, part, figures):
    path = tmp_path / "report.json"
    gpu.run_part(part, "cpu", 60.0, path)
    found = json.loads(path.read_text())
    assert set(figures) <= set(found["figures"])
    budgets = [Budget.from_json(row) for row in found["budgets"]]
    # Times mean nothing here; counts of what is wrong do.
    assert not [budget for budget in budgets if budget.unit != "%" and budget.met is False]
    if part == "tune":
        assert "need a GPU" in found["skipped"]["tune"]


def test_a_part_that_is_stopped_costs_its_own_results_only(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "GRACE", 0.1)
    monkeypatch.setitem(gpu.PARTS, "ab", gpu.Part(gpu_training.compare, 0.4))
    monkeypatch.setattr(gpu, "environment", dict)
    assert gpu.main(["--cpu", "--only", "ab", "--json", str(tmp_path / "gpu.json")]) == 1
    said = capsys.readouterr().out
    assert "the rest of part ab" in said
    assert "not measured  (stopped after 0 s)" in said
    assert json.loads((tmp_path / "gpu.json").read_text())["parts"]["ab"]["budgets"] == []


def test_a_kernel_that_leaves_something_out_misses_its_budget(tmp_path, monkeypatch):
    right = gpu_kernel.domain_cross_entropy
    monkeypatch.setattr(gpu_kernel, "domain_cross_entropy", lambda *a, z_loss=0.0, **options: right(*a, **options))
    report = gpu.run_part("kernel", "cpu", 60.0, tmp_path / "report.json")
    (budget,) = report.budgets
    assert budget.met is False
    wrong = [row["case"] for row in report.rows if row["loss"] > 1e-5]
    assert wrong == [row["case"] for row in report.rows if "everything" in row["case"]]


def test_a_loss_that_is_wrong_is_not_timed():
    inputs = loss_plain.make_inputs(40, 30, torch.float32, "cpu", 0)
    for wrong in (
        lambda x: F.cross_entropy(x.logits, x.targets) * 1.001,
        lambda x: F.cross_entropy(x.logits, x.targets) + 0.1 * (x.logits - x.logits.detach()).sum(),
        lambda x: F.cross_entropy(x.logits, x.targets) * float("nan"),
    ):
        with pytest.raises(ValueError, match="is off by"):
            loss_plain.verify("it", wrong, inputs)
    (head,) = loss_head.make_inputs(40, 8, 30, torch.float32, "cpu", 1)
    half = {"it": lambda x: F.cross_entropy(F.linear(x.hidden, x.weight.detach() / 2 + x.weight / 2), x.targets)}
    with pytest.raises(ValueError, match="off by"):
        loss_head.verify(half, {}, head)


def test_a_size_that_fails_costs_its_own_rows_only(tmp_path, monkeypatch, capsys):
    right = loss_plain.measure

    def measure(tokens, n_classes, *rest, **options):
        if n_classes == 20:
            raise ValueError("the gradient of it is off by 1e+00")
        return right(tokens, n_classes, *rest, **options)

    monkeypatch.setattr(loss_plain, "measure", measure)
    options = ["--tokens", "8", "--classes", "20", "30", "--dtypes", "float32", "--rounds", "1", "--threads", "1"]
    assert loss.main([*options, "--no-compile", "--device", "cpu", "--json", str(tmp_path / "loss.json")]) == 1
    assert "off by 1e+00" in capsys.readouterr().out
    rows = json.loads((tmp_path / "loss.json").read_text())["rows"]
    assert {row["classes"] for row in rows} == {30}
    copy = next(row for row in rows if row["loss"] == loss_plain.COPY)
    assert copy["share_of_copy"]["median"] == 1


def test_the_interval_covers_the_mean_of_pairs():
    rng = np.random.default_rng(1)
    drift = 20 + rng.normal(0, 2, 80).cumsum() / 9
    assert gpu_training.interval(drift * 1.002, drift) == pytest.approx((0.2, 0.2, 0.2))
    covered = 0
    for _ in range(200):
        base = drift + rng.normal(0, 0.02, 80)
        _, low, high = gpu_training.interval(drift * 1.001 + rng.normal(0, 0.02, 80), base, draws=400)
        covered += low <= 0.1 <= high
    assert 180 <= covered <= 199


def test_budgets_say_whether_they_are_met():
    budgets = [
        Budget("share", 84.9, 85.0, "%", at_least=True),
        Budget("cost", 0.3, 0.3, "%"),
        Budget("over Liger", None, 1.0, "x", note="Liger was not measured"),
    ]
    assert [budget.met for budget in budgets] == [False, True, None]
    assert [Budget.from_json(budget.to_json()) for budget in budgets] == budgets
    lines = table(budgets).splitlines()[1:]
    assert "MISSED" in lines[0]
    assert ">= 85 %" in lines[0]
    assert lines[1].endswith("met")
    assert lines[2].endswith("not measured  (Liger was not measured)")
