"""`mixloader fit-agent` on runs that the simulator made: its stages, what it writes, and going on when stopped."""

import json
from dataclasses import replace

import numpy as np
import pytest
from simulated import made_runs

from mixloader.agent.fit_agent import Fit, main
from mixloader.agent.network import read_tensors
from mixloader.agent.policy import Agent
from mixloader.agent.trajectories import write_trajectories
from mixloader.errors import ConfigError

pytestmark = pytest.mark.slow
SMALL = ["--batches", "2", "--batch", "8", "--updates", "3", "--learners", "bc", "cql"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    runs, _ = made_runs(13, 5)
    usable = [one for one in runs if len(one.feedback_names) == 2]
    assert len(usable) >= 10
    path = tmp_path_factory.mktemp("runs") / "trajectories.zst"
    write_trajectories(
        path, [replace(one, meta={**one.meta, "fold": "maths", "number": i}) for i, one in enumerate(usable)]
    )
    return path


@pytest.fixture(scope="module")
def folder(file, tmp_path_factory):
    out = tmp_path_factory.mktemp("fit")
    assert main([str(file), "--out", str(out), *SMALL]) == 0
    return out


def test_it_writes_every_stage_and_chooses_the_best_on_the_runs_left_out(folder):
    report = json.loads((folder / "report.json").read_text())
    judged = {name: scores["agent"]["score"] for name, scores in report["scores_on_twins"].items()}
    assert set(judged) == {"warm-up", "bc", "cql"}
    assert judged[report["chosen"]] == max(judged.values())
    chosen = (folder / "agent.safetensors").read_bytes()
    assert chosen == (folder / f"{report['chosen']}.safetensors").read_bytes()
    assert report["left_out"] == report["runs"] // 5
    assert np.isfinite(report["unseen"]["calibrated"]["all"])
    assert read_tensors(folder / "agent.safetensors")[1]["fit"]["folds"] == ["maths"]
    assert Agent(parameters=folder / "agent.safetensors").uses == {"influence", "feedback"}


def test_stopped_it_goes_on_with_what_is_missing_and_ends_with_the_same_bytes(file, folder, monkeypatch, capsys):
    before = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    (folder / "cql.safetensors").unlink()
    monkeypatch.setattr("mixloader.agent.fit_agent.fit", None)  # not called again
    assert main([str(file), "--out", str(folder), *SMALL]) == 0
    assert {path.name: path.read_bytes() for path in folder.glob("*.safetensors")} == before
    assert str(folder / "agent.safetensors") in capsys.readouterr().out


def test_other_settings_make_the_stages_anew(file, folder, tmp_path):
    for path in folder.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    main([str(file), "--out", str(tmp_path), *SMALL[:1], "1", *SMALL[2:]])
    assert (tmp_path / "warm-up.safetensors").read_bytes() != (folder / "warm-up.safetensors").read_bytes()
    assert (tmp_path / "calibration.json").read_bytes() == (folder / "calibration.json").read_bytes()


def test_mistakes_are_one_sentence(file, tmp_path):
    with pytest.raises(ConfigError, match="0 runs are too few"):
        main([str(file), "--out", str(tmp_path), "--fold", "code"])
    with pytest.raises(ConfigError, match="there is no learner 'sac'"):
        Fit(made_runs(10, 0)[0], tmp_path, learners=("sac",))
