"""The demo, whole but tiny: what it ends with, that it can be killed, and the base model it ships with."""

import fcntl
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mixloader.demo import base, run
from mixloader.demo.corpus import build_corpus, pack_corpus
from mixloader.errors import ConfigError, MixLoaderError, StateError
from mixloader.evaluate import held_out_loss
from mixloader.record import read_record
from mixloader.report import load_run, means
from mixloader.train.checkpoint import latest_checkpoint, load_parameters
from mixloader.train.model import build_model

SIZE = ["--seeds", "1", "--steps", "8", "--scale", "0.03"]
RUNS = ("target-seed0", "half-seed0", "agent-seed0")


def command(out: Path) -> list[str]:
    return [sys.executable, "-m", "mixloader", "demo", "--out", str(out), *SIZE]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder and the output of a demo that nobody killed."""
    out = tmp_path_factory.mktemp("demo") / "out"
    with redirect_stdout(StringIO()) as printed:
        assert run.main(["--out", str(out), *SIZE]) == 0
    return out, printed.getvalue()


def test_it_ends_with_the_table_the_picture_and_the_records(finished):
    out, printed = finished
    for name in ("table.txt", "report.png"):
        assert str(out / name) in printed
        assert (out / name).stat().st_size > 500
    assert (out / "table.txt").read_text() in printed
    fields = json.loads((out / "data" / "corpus.json").read_text())["fields"]
    assert len(fields) >= 6
    for title in (*fields, "source mean", "target mean", "balanced mean", "target only", "half and half", "agent"):
        assert title in printed
    assert "agent minus half and half" in printed
    for name in RUNS:
        record = read_record(out / name / "record.jsonl")
        assert len(record.decisions) == 8
        assert not record.torn


def test_the_figures_of_the_table_are_those_of_the_runs(finished):
    out, printed = finished
    runs = [load_run(out / name) for name in RUNS]
    for field in ("source", "target", "balanced"):
        line = next(line for line in printed.splitlines() if line.startswith(f"{field} mean"))
        expected = [means(losses, runs[0].fields)[field] for losses in (runs[0].before, *(r.after for r in runs))]
        assert [float(x) for x in re.findall(r"\d+\.\d+", line)] == pytest.approx(expected, abs=6e-4)


def test_all_ways_read_the_same_number_of_tokens_and_differ_in_the_mixture_alone(finished):
    out, _ = finished
    headers = [read_record(out / name / "record.jsonl").header for name in RUNS]
    for key in ("manifest", "seed", "global_batch", "seq_len", "domains", "fields", "token_budget"):
        assert headers[0][key] == headers[1][key] == headers[2][key]
    assert headers[1]["weights"] == headers[2]["weights"]  # the agent starts from half and half
    assert len({json.loads((out / name / "result.json").read_text())["tokens"] for name in RUNS}) == 1
    mixtures = [read_record(out / name / "record.jsonl").decisions[-1]["weights"] for name in RUNS]
    sources = [i for i, field in enumerate(headers[0]["fields"]) if field == "source"]
    shares = [sum(units[i] for i in sources) / sum(units) for units in mixtures]
    assert shares[:2] == [0.0, pytest.approx(0.5, abs=1e-6)]
    assert mixtures[2] != mixtures[1]


def test_a_finished_demo_is_not_trained_again(finished, capsys):
    out, printed = finished
    before = {path: path.stat().st_mtime_ns for path in out.glob("*-seed*/*")}
    run.main(["--out", str(out), *SIZE])
    again = capsys.readouterr().out
    assert "Training 0 of 3 runs" in again
    assert (out / "table.txt").read_text() in printed
    assert {path: path.stat().st_mtime_ns for path in out.glob("*-seed*/*")} == before


@pytest.mark.slow
def test_killed_and_run_again_it_ends_as_if_never_killed(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished[0] / "data", out / "data")
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command(out), stdout=log, stderr=log)
        deadline = time.monotonic() + 200
        # In the middle: the agent is beyond its first checkpoint and not at its end.
        while not any(path.name > "step-000000" for path in (out / "agent-seed0").glob("step-*")):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (out / "agent-seed0" / "result.json").exists()
    assert len(children) >= 2
    while any(_runs(child) for child in children):
        assert time.monotonic() < deadline, "training processes outlive the demo"
        time.sleep(0.01)

    result = subprocess.run(command(out), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert read_record(out / "agent-seed0" / "record.jsonl").attempts == 2
    for name in RUNS:
        _assert_same_run(out / name, finished[0] / name)
    assert (out / "table.txt").read_text() == (finished[0] / "table.txt").read_text()


def _runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _assert_same_run(one: Path, other: Path) -> None:
    first, second = (read_record(folder / "record.jsonl") for folder in (one, other))
    assert first.decisions == second.decisions
    assert {**first.header, "created": None} == {**second.header, "created": None}
    parameters, expected = (load_file(latest_checkpoint(folder) / "model.safetensors") for folder in (one, other))
    assert parameters.keys() == expected.keys()
    for name, tensor in parameters.items():
        assert torch.equal(tensor, expected[name]), name


def test_runs_of_other_settings_are_refused(finished):
    out, _ = finished
    with pytest.raises(StateError, match=r"holds runs with steps = 8, but now it is 9; add --fresh"):
        run.main(["--out", str(out), *SIZE, "--steps", "9"])
    with pytest.raises(ConfigError, match="--seeds is 0"):
        run.main(["--out", str(out), "--seeds", "0"])


def test_two_demos_in_one_folder_are_refused(tmp_path):
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StateError, match="another demo works in"):
            run.main(["--out", str(tmp_path)])


def test_without_matplotlib_all_but_the_picture_is_there(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run.summarize(run.Settings(finished[0], 1, 8, 0.03))
    printed = capsys.readouterr().out
    assert "pip install 'mixloader[plot]'" in printed
    assert "balanced mean" in printed
    assert "record.jsonl" in printed


def test_fresh_removes_what_a_demo_wrote_and_nothing_else(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    (out / "notes.txt").write_text("mine")
    run._remove_former(out)
    assert sorted(path.name for path in out.iterdir()) == [".lock", "notes.txt"]


def test_a_run_that_fails_says_why_and_what_to_do(finished, tmp_path, capfd):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    (out / "half-seed0" / "result.json").unlink()
    for shard in (out / "data" / "legal").glob("*.bin"):
        shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(MixLoaderError, match="Run the same command again"):
        run.main(["--out", str(out), *SIZE])
    assert "truncated" in capfd.readouterr().err


# The base model


def test_the_shipped_base_model_is_small_and_knows_its_source_domains(finished):
    assert base.PARAMETERS.stat().st_size + base.TOKENIZER.stat().st_size <= 2.5e6
    config = base.base_model()
    model = build_model(config)
    load_parameters(base.PARAMETERS, model)
    corpus = build_corpus(scale=0.02)
    manifest = pack_corpus(corpus, finished[0].parent / "shipped", base.load_tokenizer())
    losses = held_out_loss(model, manifest, seq_len=base.SEQ_LEN, windows_per_domain=4)
    source = [losses[name] for name, field in corpus.fields.items() if field == "source"]
    assert max(source) < 0.6 * math.log(config.vocab_size)


def test_a_base_model_of_another_tokenizer_is_refused(monkeypatch, tmp_path):
    other = tmp_path / "tokenizer.json"
    other.write_text(base.TOKENIZER.read_text() + " ")
    monkeypatch.setattr(base, "TOKENIZER", other)
    with pytest.raises(StateError, match="another tokenizer"):
        base.base_model()


def test_the_command_makes_both_files_anew(monkeypatch, tmp_path):
    shipped = base.base_model()
    monkeypatch.setattr(base, "TOKENIZER", tmp_path / "tokenizer.json")
    monkeypatch.setattr(base, "PARAMETERS", tmp_path / "base.safetensors")
    monkeypatch.setattr(base, "build_corpus", lambda scale: build_corpus(scale=0.02))
    threads = torch.get_num_threads()
    try:
        base.main(["--out", str(tmp_path / "run"), "--steps", "2"])
    finally:
        torch.set_num_threads(threads)
    assert base.base_model() == shipped
    assert base.load_tokenizer().get_vocab_size() == base.VOCAB_SIZE
    load_parameters(base.PARAMETERS, build_model(base.base_model()))
    names = {domain["name"] for domain in json.loads((tmp_path / "run/data/source.json").read_text())["domains"]}
    assert names == {"python_code", "cpp_code", "python_docs", "package_docs", "legal"}
