"""Checkpoints: exact, atomic, and refused with a sentence when they are not what is asked for."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mixloader.config import ModelConfig, TrainConfig
from mixloader.errors import MixLoaderError, StateError
from mixloader.train import checkpoint as checkpoints
from mixloader.train.model import build_model
from mixloader.train.optimizer import build_optimizer

SMALL = {"vocab_size": 31, "seq_len": 8, "n_layer": 1, "n_head": 2, "n_embd": 8}


def parts(seed: int = 0, **changes):
    torch.manual_seed(seed)
    model = build_model(ModelConfig(**(SMALL | changes)))
    return model, build_optimizer(model, TrainConfig(data="d", out="o"))


def take_steps(model, optimizer, count: int = 3) -> None:
    for _ in range(count):
        ids = torch.randint(31, (2, 8))
        torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def everything(model, optimizer) -> dict[str, torch.Tensor]:
    """Every tensor of both, by name; optimizer state by position."""
    state = {f"{i}/{key}": v for i, values in optimizer.state_dict()["state"].items() for key, v in values.items()}
    return copy.deepcopy(dict(model.state_dict()) | state)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_model_optimizer_and_generator_come_back_exactly(tmp_path, steps, tied):
    model, optimizer = parts(tie_word_embeddings=tied)
    take_steps(model, optimizer, steps)
    path = checkpoints.save_checkpoint(tmp_path, 3, model, optimizer, {"mixer": {"x": [1]}})
    expected = everything(model, optimizer)
    drawn = torch.rand(4)
    take_steps(model, optimizer)
    later = everything(model, optimizer)

    other, other_optimizer = parts(seed=9, tie_word_embeddings=tied)
    state = checkpoints.load_checkpoint(path, other, other_optimizer)
    assert state["step"] == 3
    assert state["mixer"] == {"x": [1]}
    assert_same(everything(other, other_optimizer), expected)
    assert torch.equal(torch.rand(4), drawn)
    take_steps(other, other_optimizer)
    assert_same(everything(other, other_optimizer), later)


def test_tied_parameters_are_stored_once(tmp_path):
    model, optimizer = parts()
    path = checkpoints.save_checkpoint(tmp_path, 0, model, optimizer, {})
    with safe_open(path / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == {name for name, _ in model.named_parameters()}
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118


def test_the_latest_is_by_number_and_old_ones_go(tmp_path):
    model, optimizer = parts()
    assert checkpoints.latest_checkpoint(tmp_path) is None
    for step in (5, 999_999, 1_000_000):
        checkpoints.save_checkpoint(tmp_path, step, model, optimizer, {})
    (tmp_path / ".step-2000000.tmp").mkdir()
    (tmp_path / "step-000007.bak").mkdir()
    assert checkpoints.latest_checkpoint(tmp_path) == tmp_path / "step-1000000"
    checkpoints.remove_old(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000007.bak", "step-1000000", "step-999999"]


def test_a_writer_that_dies_anywhere_leaves_the_old_or_the_new(tmp_path, monkeypatch):
    """Every fsync and rename fails in turn; what is found afterwards is one whole checkpoint or the other."""
    model, optimizer = parts()
    checkpoints.save_checkpoint(tmp_path, 1, model, optimizer, {"which": "old"})
    failures = 0
    for n in range(100):
        calls = iter(range(100))

        def fail(function, n=n, calls=calls):
            def call(*args, **kwargs):
                if next(calls) == n:
                    raise OSError(28, "No space left on device")
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail(os.fsync))
            patch.setattr(Path, "rename", fail(Path.rename))
            error = None
            try:
                checkpoints.save_checkpoint(tmp_path, 2, model, optimizer, {"which": "new"})
            except MixLoaderError as raised:
                error = str(raised)
        if error is None:
            break
        failures += 1
        assert "No space left" in error
        assert not list(tmp_path.glob(".step-*"))
        latest = checkpoints.latest_checkpoint(tmp_path)
        state = checkpoints.load_checkpoint(latest, *parts(seed=n))
        assert state["which"] == ("new" if latest.name == "step-000002" else "old")
        if latest.name == "step-000002":
            latest.rename(tmp_path / ".step-000002.tmp")
    assert failures == 6  # three files, their folder, the rename, the folder above
    assert checkpoints.load_checkpoint(tmp_path / "step-000002", *parts())["which"] == "new"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_damaged_files_are_named(tmp_path, name, damage):
    model, optimizer = parts()
    take_steps(model, optimizer)
    file = checkpoints.save_checkpoint(tmp_path, 1, model, optimizer, {}) / name
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    with pytest.raises(StateError, match=f"cannot read .*{name}"):
        checkpoints.load_checkpoint(tmp_path / "step-000001", *parts())


def test_a_later_version_is_refused(tmp_path):
    path = checkpoints.save_checkpoint(tmp_path, 1, *parts(), {})
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"version": 2}))
    with pytest.raises(StateError, match="has version 2; this mixloader reads version 1"):
        checkpoints.read_state(path)


def test_parameters_load_from_a_run_a_checkpoint_or_a_file(tmp_path):
    model, optimizer = parts(seed=1)
    checkpoints.save_checkpoint(tmp_path, 1, *parts(seed=2), {})
    path = checkpoints.save_checkpoint(tmp_path, 2, model, optimizer, {})
    for source in (tmp_path, path, path / "model.safetensors"):
        other, _ = parts(seed=3)
        checkpoints.load_parameters(source, other)
        assert_same(dict(other.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_embd": 16}, r"holds .* of shape .*; the model has"),
        ({"n_layer": 2}, "has no parameter h.1.attn.c_attn.weight"),
        ({"family": "llama"}, "parameter"),
        ({"tie_word_embeddings": False}, "has no parameter lm_head.weight"),
    ],
)
def test_parameters_of_another_model_are_refused_and_change_nothing(tmp_path, changes, said):
    checkpoints.save_checkpoint(tmp_path, 1, *parts(), {})
    other, _ = parts(**changes)
    before = copy.deepcopy(dict(other.state_dict()))
    with pytest.raises(StateError, match=said):
        checkpoints.load_parameters(tmp_path, other)
    assert_same(dict(other.state_dict()), before)


def test_an_empty_folder_has_no_parameters(tmp_path):
    with pytest.raises(StateError, match="holds no checkpoint"):
        checkpoints.load_parameters(tmp_path, parts()[0])
