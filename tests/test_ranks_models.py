"""Tiny models on two ranks under DDP and FSDP2 against one process; the reference trainer on two ranks."""

import json
from pathlib import Path

import numpy as np
import pytest
import ranks_models
import torch.distributed as dist
from ranks_run import run
from tiny_run import tiny_data

from mixloader.record import read_record

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(tiny_data(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def both(data, tmp_path_factory):
    return run("models", 2, tmp_path_factory.mktemp("both"), data=data)


@pytest.fixture(scope="module")
def alone(data):
    return ranks_models.train_model("alone", data, 1)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_influence_on_two_ranks_is_that_of_one_process_on_the_same_rows(both, alone, kind, before):
    for each in both:
        found = each[f"{kind} {before}"]
        assert found["total"] == pytest.approx(alone["total"], rel=1e-5), "the same training, too"
        for ours, theirs in zip(found["tables"], alone["tables"], strict=True):
            for key, expected in theirs.items():
                expected = np.array(expected)
                scale = np.nanmax(np.abs(expected)) if np.isfinite(expected).any() else 0.0
                np.testing.assert_allclose(np.array(ours[key]), expected, rtol=1e-3, atol=1e-5 * scale, err_msg=key)
    assert np.isfinite(np.array(alone["tables"][-1]["value"])).all()
    assert both[0][f"{kind} {before}"]["losses"] == pytest.approx(alone["losses"], rel=1e-5)


def test_G2_a_live_policy_decides_the_same_on_all_ranks_and_nearly_so_on_another_number(both, data):
    assert both[0]["live"]["weights"] == both[1]["live"]["weights"]
    assert both[0]["live"]["losses"] == both[1]["live"]["losses"]
    ours, theirs = np.array(both[0]["live"]["weights"]), np.array(ranks_models.live("alone", data, 1)["weights"])
    assert len(np.unique(ours[:, 0])) > 15
    # Sums of gradients are rounded in another order, and what a policy makes of that grows with the run.
    assert np.abs(ours - theirs).max() < 1e-4


def test_objective_weights_and_accumulation_are_those_of_one_process(both, data):
    expected = ranks_models.objective("alone", data, 1)
    for each in both:
        np.testing.assert_allclose(each["objective"]["factors"], expected["factors"], rtol=1e-4)
        assert each["objective"]["total"] == pytest.approx(expected["total"], rel=1e-5)
    assert both[0]["objective"]["factors"] == both[1]["objective"]["factors"]
    assert len({tuple(factors) for factors in expected["factors"]}) > 4


def test_fsdp2_resumes_exactly_from_torch_distributed_checkpoint(both):
    for each in both:
        assert each["fsdp2"]["resumed"] == each["fsdp2"]["whole"], "batches, weights and parameters, bit for bit"
        assert len(set(each["fsdp2"]["whole"]["weights"])) == 3


def metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{**json.loads(line), "tokens_per_second": 0} for line in lines]


def test_the_reference_trainer_resumes_exactly_on_two_ranks(both):
    for each in both:
        assert each["again"] == each["whole"], "a finished run is returned"
        for key in ("losses_before", "losses_after", "steps", "tokens"):
            assert each["resumed"][key] == each["whole"][key]
    whole, resumed = (Path(both[0][run]["checkpoint"]) for run in ("whole", "resumed"))
    for name in ("model.safetensors", "optimizer.safetensors", "influence.safetensors"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes(), name
    mine, theirs = (read_record(both[0][run]["record"]) for run in ("resumed", "whole"))
    assert mine.decisions == theirs.decisions
    assert mine.attempts == 2
    assert metrics(resumed.parent) == metrics(whole.parent)
    said = "StateError: {} holds a run with seed = 0, but now it is 7; go on with the former value"
    assert both[0]["other seed"].startswith(said.format(whole.parent))
    assert both[1]["other seed"].startswith("RankError: rank 0 failed: " + said.format(whole.parent))
    assert both[0]["whole"]["tokens"] == 12 * 2 * 2 * 2 * 16
