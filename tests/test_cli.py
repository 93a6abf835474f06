"""The command line, as a user has it: verbs, sentences instead of tracebacks, and a run that SIGKILL cannot harm."""

import gzip
import hashlib
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny_run import FIELDS, tiny_config, tiny_data

from mixloader import cli
from mixloader.config import TrainConfig
from mixloader.documents import Documents, train_tokenizer
from mixloader.errors import ConfigError, MixLoaderError
from mixloader.formats import read_tokens
from mixloader.manifest import Manifest
from mixloader.record import read_record
from mixloader.reference import ReferenceStream
from mixloader.train.checkpoint import latest_checkpoint

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"))


def write_config(path: Path, config) -> Path:
    path.write_text(yaml.safe_dump(config.to_dict()))
    return path


def start(*arguments: object) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mixloader", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_run_killed_again_and_again_is_the_run_that_was_not(data, tmp_path):
    """G3, with the shipped agent: the same command after SIGKILL ends with the same bits and the same record."""
    changes = {"steps": 200, "policy": "agent", "checkpoint_every": 5, "lag": 2, "feedback": True}
    whole = start("train", write_config(tmp_path / "whole.yaml", tiny_config(data, tmp_path / "whole", **changes)))
    out = tmp_path / "killed"
    path = write_config(tmp_path / "killed.yaml", tiny_config(data, out, **changes))
    rng = random.Random(0)
    for least in (10, 70):
        process = start("train", path)
        while process.poll() is None and step_of(out) < least:
            time.sleep(0.002)
        time.sleep(0.03 * rng.random())
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    last = start("train", path)
    for process in (whole, last):
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    assert "going on from" in errors
    assert "200 steps" in output
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (out / "step-000200" / name).read_bytes() == (tmp_path / "whole" / "step-000200" / name).read_bytes()
    killed, expected = (read_record(folder / "record.jsonl") for folder in (out, tmp_path / "whole"))
    assert killed.attempts == 3
    assert expected.attempts == 1
    assert killed.decisions == expected.decisions
    assert killed.changes == expected.changes
    assert killed.events == expected.events
    results = [json.loads((folder / "result.json").read_text()) for folder in (out, tmp_path / "whole")]
    assert results[0]["losses_after"] == results[1]["losses_after"]


def step_of(out: Path) -> int:
    path = latest_checkpoint(out) if out.exists() else None
    return int(path.name[5:]) if path else -1


def test_train_prints_what_it_did_and_replay_draws_it_again(data, tmp_path, capsys):
    path = write_config(tmp_path / "train.yaml", tiny_config(data, tmp_path / "run", grad_accumulation_steps=2))
    assert cli.main(["train", str(path), "--steps", "6", "--no-progress"]) == 0
    output = capsys.readouterr().out
    assert "6 steps, 768 tokens" in output
    assert all(name in output for name in FIELDS)

    record = tmp_path / "run" / "record.jsonl"
    assert cli.main(["replay", str(record), str(data)]) == 0
    output = capsys.readouterr().out
    assert "6 steps of 8 rows of 16 tokens" in output
    digest = hashlib.sha256()
    rows = dict.fromkeys(FIELDS, 0)
    for name, window in drawn_windows(data, record):
        digest.update(window.astype("<i8").tobytes())
        rows[name] += 1
    assert f"sha256 {digest.hexdigest()}" in output
    assert {line.split()[0]: int(line.split()[1]) for line in output.splitlines()[:3]} == rows
    assert cli.main(["replay", str(record), str(data), "--steps", "3"]) == 0
    assert digest.hexdigest() not in capsys.readouterr().out
    assert cli.main(["replay", str(record), str(data), "--steps", "7"]) == 2
    assert "knows the weights of steps 0 to 6" in capsys.readouterr().err


def drawn_windows(data: Path, record: Path):
    """(domain, window of 17 tokens) of every row of a recorded run, by the plain-Python reference of the plan."""
    run, domains = read_record(record), Manifest.open(data).domains
    windows = [
        [read_tokens(shard, i, 17) for shard in d.shards for i in range(0, shard.tokens - 16, 16)] for d in domains
    ]
    units = {step: run.units_at(step).tolist() for step in range(run.steps)}
    stream = ReferenceStream(run.header["seed"], list(FIELDS), list(map(len, windows)), 8, units)
    for _ in range(run.steps):
        for row in stream.next_step():
            yield domains[row.domain].name, windows[row.domain][row.window]


def test_pack_makes_data_that_train(tmp_path, capsys):
    (tmp_path / "prose").mkdir()
    for i in range(8):
        (tmp_path / "prose" / f"{i}.txt").write_text(f"the {i} quick brown foxes jump over the lazy dog\n" * 20)
    with gzip.open(tmp_path / "maths.jsonl.gz", "wt") as file:
        for i in range(60):
            file.write(json.dumps({"text": f"{i} plus {i} is {2 * i}, and that is all. " * 5}) + "\n\n")
    out = tmp_path / "packed"
    arguments = [f"prose={tmp_path / 'prose'}", f"maths={tmp_path / 'maths.jsonl.gz'}", "--target", "maths"]
    arguments += ["--vocab_size", "300", "--validation_fraction", "0.25"]
    assert cli.main(["pack", str(out), *arguments]) == 0
    output = capsys.readouterr().out
    assert "target" in output
    manifest = Manifest.open(out)
    assert manifest.vocab_size == 300
    assert [domain.field for domain in manifest.domains] == ["source", "target"]
    assert all(domain.validation for domain in manifest.domains)
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    text = tokenizer.decode(read_tokens(manifest.domain("maths").shards[0]).tolist(), skip_special_tokens=False)
    assert text.startswith("0 plus 0 is 0, and that is all. ")
    assert text.count("<|endoftext|>") == 45
    # Packed again with the tokenizer that the first call made, the shards are the same.
    again = tmp_path / "again"
    assert cli.main(["pack", str(again), *arguments, "--tokenizer", str(out / "tokenizer.json")]) == 0
    assert Manifest.open(again).fingerprint == manifest.fingerprint
    run = ["--data", str(out), "--out", str(tmp_path / "run"), "--steps", "2", "--seq_len", "32", "--batch_size", "2"]
    small = ["--policy", "fields", "--model.n_layer", "1", "--model.n_embd", "16", "--device", "cpu"]
    assert cli.main(["train", *run, *small, "--model.family", "llama"]) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "unknown verb 'trian'; the verbs are train, compare, demo, pack"),
        (["train", "none.yaml"], "cannot read the config none.yaml"),
        (["train", "--data", "nowhere", "--out", "run"], "nowhere does not exist"),
        (
            ["train", "--data", "nowhere", "--out", "run", "--stps", "3"],
            "unknown key stps; the nearest known key is steps",
        ),
        (["train", "--data", "nowhere", "--out", "run", "--steps", "abc"], "steps is 'abc'; expected a whole number"),
        (["pack", "out", "prose"], "'prose' is no new name=path"),
        (["pack", "out", "a=x.txt", "a=x.txt"], "'a=x.txt' is no new name=path"),
        (["pack", "out", "b=nowhere"], "nowhere does not exist; expected a file that ends in .txt"),
        (["pack", "out", "a=x.txt", "--target", "b"], "--target b is no domain; the domains are a"),
        (["pack", "out", "a=x.txt", "--tokenizer", "x.txt"], "cannot read the tokenizer x.txt"),
        (["pack", "out", "a=x.txt", "--vocab_size", "256"], "vocab_size is 256; expected at least 257"),
        (["replay", "none.jsonl", "nowhere"], "cannot read record none.jsonl"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    Path("x.txt").write_text("some text")
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert not Path("run").exists()
    assert not Path("out").exists()


def test_usage_and_help_name_what_there_is(capsys):
    assert cli.main([]) == 0
    usage = capsys.readouterr().out
    assert all(f"\n  {verb} " in usage for verb in cli.VERBS)
    for verb in cli.VERBS:
        with pytest.raises(SystemExit) as ended:
            cli.main([verb, "--help"])
        assert ended.value.code == 0
        output = capsys.readouterr().out
        assert output.startswith("usage: python -m mixloader")
        assert verb != "train" or "grad_accumulation_steps" in output


def test_importing_the_command_line_loads_no_heavy_part():
    code = (
        "import sys, mixloader.cli; print([m for m in ('torch', 'numba', 'yaml', 'safetensors') if m in sys.modules])"
    )
    # mixloader itself imports torch; nothing of the command line adds to it.
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output == "['torch']\n"


def test_documents_that_are_no_text_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"txt": 1}\n')
    with pytest.raises(MixLoaderError, match=r"a.jsonl, line 2 is no JSON object with a \"text\""):
        list(Documents(tmp_path))
    (tmp_path / "a.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(MixLoaderError, match=r"line 1 has a \"text\" that is no text: 3"):
        list(Documents(tmp_path))
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(MixLoaderError, match=r"cannot read .*b.txt: .*; expected UTF-8"):
        list(Documents(tmp_path))
    (tmp_path / "b.txt").rename(tmp_path / "b.bin")
    with pytest.raises(ConfigError, match=r"holds no file that ends in \.txt"):
        Documents(tmp_path)


def test_the_trained_tokenizer_takes_any_text():
    tokenizer = train_tokenizer(["abc " * 30], 260)
    text = "Grüße, 世界\t\n\x00"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.token_to_id("<|endoftext|>") == 0


def test_the_example_trains(data, tmp_path, monkeypatch, capsys):
    """examples/nanogpt_style.py as a user would run it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["nanogpt_style.py", str(data), "31"])
    runpy.run_path(str(ROOT / "examples" / "nanogpt_style.py"))
    losses = [float(line.split("loss ")[1].split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.1
    assert len(read_record(tmp_path / "record.jsonl").decisions) == 31


def test_the_example_config_is_valid():
    config = TrainConfig.from_yaml(ROOT / "examples" / "train.yaml")
    assert config.model.family == "llama"
    assert config.learning_rate == 6e-4
