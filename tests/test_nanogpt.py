"""nanoGPT-style scripts: the same loss, what evaluations see, exact resume, and data as they are."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from killing import ROOT, kill_at_step
from nanogpt_loop import TinyGPT, main, seen
from tiny_run import FIELDS, VOCAB_SIZE, tiny_data

from mixloader import MixLoader, read_record
from mixloader.errors import ConfigError, MixLoaderError, StateError
from mixloader.integrations.nanogpt import MixedBatches

ITERATIONS = 9


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"))


def run(data, out, accumulation=1, policy="chase", how="scratch"):
    out.mkdir(exist_ok=True)
    main(data, out, ITERATIONS, accumulation, policy, how)
    return seen(out)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """What an uninterrupted run sees, by accumulation and policy."""
    return {
        key: run(data, tmp_path_factory.mktemp("whole"), *key) for key in ((1, "chase"), (2, "chase"), (1, "influence"))
    }


def open_mix(data, **options):
    return MixedBatches(data, TinyGPT(), **({"batch_size": 4, "block_size": 16, "policy": "natural"} | options))


def test_the_loss_is_that_of_the_model(whole):
    for line in whole[2, "chase"].values():
        for own, ours in line["losses"]:
            assert math.isclose(own, ours, rel_tol=1e-5)


@pytest.mark.parametrize(("accumulation", "policy"), [(1, "chase"), (2, "chase"), (1, "influence")])
def test_a_run_that_is_stopped_and_resumed_is_the_run_that_was_not(data, whole, tmp_path, accumulation, policy):
    expected = whole[accumulation, policy]
    first = run(data, tmp_path, accumulation, policy)
    assert first == expected
    decisions = read_record(tmp_path / "record.jsonl").decisions
    assert run(data, tmp_path, accumulation, policy, "resume") == expected  # again from iteration 8, the last saved
    assert read_record(tmp_path / "record.jsonl").decisions == decisions


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_is_the_run_that_was_not(data, whole, tmp_path):
    kill_at_step(7, ROOT / "tests" / "nanogpt_loop.py", data, tmp_path, ITERATIONS, 2, "chase", "scratch")
    assert sorted(seen(tmp_path)) == list(range(6))
    assert run(data, tmp_path, 2, "chase", "resume") == whole[2, "chase"]


def test_the_batches_are_the_loaders(data, tmp_path):
    """An evaluation in between, and the promise of the next batch, change nothing in the stream."""
    mix = open_mix(data, gradient_accumulation_steps=2, seed=5)
    loader = MixLoader(data, 4, 16, grad_accumulation_steps=2, seed=5, vocab_size=VOCAB_SIZE)
    held = mix("train")
    for _ in range(3):
        for _ in range(2):
            with torch.no_grad():
                mix("val"), mix("train")
            expected = next(loader)
            assert torch.equal(held[0], expected["input_ids"])
            assert torch.equal(held[1], expected["targets"])
            mix.loss(torch.zeros(4, 16, VOCAB_SIZE, requires_grad=True), held[1])
            held = mix("train")
        mix.step()
    mix.close()
    loader.close()


def test_an_evaluation_sees_each_domain_alike_and_the_same_each_time(data):
    mix = open_mix(data, batch_size=6)
    seen = []
    for _ in range(2):
        x, y = mix("train")
        mix.loss(torch.zeros(6, 16, VOCAB_SIZE, requires_grad=True), y)
        mix.step()
        with torch.no_grad():
            seen.append({split: [mix(split) for _ in range(2)] for split in ("train", "val")})
    for split in ("train", "val"):
        for (x, y), (again_x, again_y) in zip(seen[0][split], seen[1][split], strict=True):
            assert torch.equal(x, again_x)
            assert torch.equal(y, again_y)
    first = [next(iter(mix.loader.held_out(1, domains=[name])))["input_ids"][0] for name in mix.loader.names]
    x, _ = seen[0]["val"][0]
    assert torch.equal(x[:3], torch.stack(first))
    assert not torch.equal(x[:3], x[3:])
    mix.close()


def test_weights_set_by_hand_hold_from_the_step_that_no_batch_was_drawn_of(data):
    """nanoGPT holds the first micro-batch of the next step when step() is over."""
    mix = open_mix(data, gradient_accumulation_steps=2)
    logits = torch.zeros(4, 16, VOCAB_SIZE, requires_grad=True)
    drawn = []
    held = mix("train")
    for step in range(4):
        for _ in range(2):
            mix.loss(logits, held[1])
            drawn.append((step, mix._given[-1][1].tolist()))
            held = mix("train")
        if step == 1:
            mix.loader.set_weights([0, 0, 1])
        mix.step()
        if step == 1:
            mix.loader.set_weights([0, 1, 0])
    mix.close()
    assert [ids for step, ids in drawn if step >= 2] == [[2] * 4] * 2 + [[1] * 4] * 2


def test_a_state_is_to_be_had_after_step_or_every_eval_interval(data):
    mix = open_mix(data, eval_interval=2)
    logits = torch.zeros(4, 16, VOCAB_SIZE, requires_grad=True)
    before = mix.state_dict()
    held = mix("train")
    states = []
    for step in range(1, 5):
        mix.loss(logits, held[1])
        held = mix("train")
        mix.step()
        if step % 2:
            with pytest.raises(MixLoaderError, match="every eval_interval steps"):
                mix.state_dict()
        else:
            states.append(json.loads(json.dumps(mix.state_dict())))
    mix.close()
    assert [before["loader"]["step"], *(state["loader"]["step"] for state in states)] == [0, 2, 4]
    again = open_mix(data, eval_interval=2, state=states[1])
    assert torch.equal(again("train")[0], held[0])
    assert again.state_dict() == states[1]  # nanoGPT saves its checkpoint again as it resumes
    again.close()


def test_data_of_nanogpt_and_llmc_are_read_where_they_are(tmp_path):
    """A folder of nanoGPT is a domain; its val.bin is held out."""
    tokens = np.arange(400, dtype="<u2") % VOCAB_SIZE
    tokens[:320].tofile(tmp_path / "train.bin")
    tokens[320:].tofile(tmp_path / "val.bin")
    mix = open_mix(tmp_path)
    x, y = mix("train")
    assert torch.equal((x + 1) % VOCAB_SIZE, y)
    with torch.no_grad():
        x, _ = mix("val")
    assert x[0].tolist() == tokens[320:336].tolist()
    mix.close()


def test_masked_targets_are_those_that_nanogpts_model_ignores(tmp_path):
    tokens = (np.arange(400, dtype="<u2") % 7) + 1
    tokens[::7] = 0  # ends of text
    tokens.tofile(tmp_path / "train.bin")
    mix = open_mix(tmp_path, loader={"documents": "eot", "mask_boundaries": True, "eot": 0})
    x, y = mix("train")
    assert (y == -1).any()
    assert (y == -100).sum() == 0
    _, own = TinyGPT()(x, y)
    assert own.isfinite()
    mix.loss(torch.zeros(4, 16, VOCAB_SIZE, requires_grad=True), y)
    mix.step()
    mix.close()


# Misuse


def test_without_step_the_promised_batch_is_refused(data):
    mix = open_mix(data)
    _, y = mix("train")
    logits = torch.zeros(4, 16, VOCAB_SIZE, requires_grad=True)
    mix.loss(logits, y)
    _, promised = mix("train")
    with pytest.raises(MixLoaderError, match="call step"):
        mix.loss(logits, promised)
    with pytest.raises(MixLoaderError, match="twice"):
        mix("train")
    with pytest.raises(MixLoaderError, match="the very same tensor"):
        mix.loss(logits, y.clone())
    mix.close()


def test_a_state_of_other_data_or_a_model_of_another_vocabulary_is_refused(data, tmp_path):
    mix = open_mix(data)
    state = mix.state_dict()
    mix.close()
    other = tiny_data(tmp_path)
    (other.parent / "prose" / "train_001.bin").unlink()
    names = {name: other.parent / name for name in FIELDS}
    with pytest.raises(StateError, match="saved with other data"):
        open_mix(names, state=state)
    with pytest.raises(StateError, match="no 'mixer'"):
        open_mix(data, state={"loader": {}})
    with pytest.raises(StateError, match="no 'influence'"):
        open_mix(data, state=state, policy="influence", influence={})
    with pytest.raises(ConfigError, match="vocabulary of 50 ids, but the model has 40"):
        MixedBatches(data, TinyGPT(40), batch_size=4, block_size=16)


def test_without_held_out_tokens_val_says_so(tmp_path):
    np.zeros(400, dtype="<u2").tofile(tmp_path / "train.bin")
    mix = open_mix(tmp_path)
    with torch.no_grad(), pytest.raises(ConfigError, match="held-out"):
        mix("val")
    mix.close()


# nanoGPT itself, which is no part of this repository


def test_nanogpts_own_script_trains_dies_and_resumes(data, tmp_path):
    checkout = os.environ.get("MIXLOADER_NANOGPT")
    if not checkout:
        pytest.skip("MIXLOADER_NANOGPT names no checkout of karpathy/nanoGPT")
    from bench.nanogpt import DOCUMENT, changed

    for file in ("model.py", "configurator.py"):
        (tmp_path / file).write_text((Path(checkout) / file).read_text())
    own = (Path(checkout) / "train.py").read_text()
    text = changed(own, DOCUMENT.read_text())
    assert sum(a not in own.splitlines() for a in text.splitlines()) <= 5
    (tmp_path / "train.py").write_text(text)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tiny").symlink_to(data.parent)
    options = {
        "dataset": "tiny", "device": "cpu", "dtype": "float32", "compile": False, "n_layer": 1, "n_head": 2,
        "n_embd": 16,
        "batch_size": 4, "block_size": 16, "gradient_accumulation_steps": 2, "eval_interval": 4, "eval_iters": 2,
        "max_iters": 9, "learning_rate": 1e-2, "warmup_iters": 2, "lr_decay_iters": 9,
    }  # fmt: skip

    def arguments(out, how="scratch"):
        return [f"--{k}={v}" for k, v in (options | {"out_dir": out, "init_from": how}).items()]

    def train(*more):
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        result = subprocess.run(
            [sys.executable, "train.py", *more], cwd=tmp_path, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return [line.split(", time")[0] for line in result.stdout.splitlines() if line.startswith(("iter", "step"))]

    expected = train(*arguments("whole"))
    kill_at_step(7, tmp_path / "train.py", *arguments("killed"), cwd=tmp_path)
    resumed = train(*arguments("killed", "resume"))
    assert resumed == expected[expected.index(resumed[0]) :]
    ours, theirs = (torch.load(tmp_path / out / "ckpt.pt") for out in ("killed", "whole"))
    assert all(torch.equal(ours["model"][name], theirs["model"][name]) for name in theirs["model"])
    assert ours["mixloader"]["loader"] == theirs["mixloader"]["loader"]
