"""The training loop: what it computes, what it leaves in its folder, and that a resume is exact."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_run import FIELDS, MODEL, VOCAB_SIZE, tiny_config, tiny_data

from mixloader.config import TrainConfig
from mixloader.errors import ConfigError, ManifestError, MixLoaderError, StateError, TokenError
from mixloader.evaluate import held_out_loss
from mixloader.formats import read_tokens
from mixloader.heldout import HeldOut
from mixloader.manifest import Manifest
from mixloader.record import read_record
from mixloader.train import trainer
from mixloader.train.model import build_model
from mixloader.train.run import RunFolder
from mixloader.train.trainer import train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"))


class Killed(Exception):
    pass


def train_until(config: TrainConfig, step: int, monkeypatch) -> None:
    """Train, and die in the middle of plan step `step`: after its backward pass, before the optimizer."""

    def die(self, batches, real=trainer.Trainer._train_step):
        if self.step == step:
            next(batches)
            raise Killed
        return real(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_train_step", die)
        with pytest.raises(Killed):
            train(config)


def parameters(result) -> dict[str, torch.Tensor]:
    return load_file(result.checkpoint / "model.safetensors")


def assert_same_run(result, expected) -> None:
    """Bitwise the same parameters and optimizer, and the same canonical record, metrics and losses."""
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (result.checkpoint / name).read_bytes() == (expected.checkpoint / name).read_bytes(), name
    mine, theirs = read_record(result.record), read_record(expected.record)
    assert mine.decisions == theirs.decisions
    assert mine.changes == theirs.changes
    assert mine.events == theirs.events
    assert metrics(result) == metrics(expected)
    assert result.losses_before == expected.losses_before
    assert result.losses_after == expected.losses_after


def metrics(result) -> list[dict]:
    lines = [json.loads(line) for line in (result.record.parent / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def test_a_run_learns_and_leaves_what_it_says(data, tmp_path):
    result = train(tiny_config(data, tmp_path, steps=40, learning_rate=3e-2, checkpoint_every=16))
    assert result.steps == 40
    assert result.tokens == 40 * 4 * 16
    assert result.tokens_per_second > 0
    assert set(result.losses_before) == set(result.losses_after) == set(FIELDS)
    for name in FIELDS:
        assert result.losses_before[name] == pytest.approx(np.log(VOCAB_SIZE), abs=0.1)
        assert result.losses_after[name] < result.losses_before[name] - 0.3, name
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".lock",
        "metrics.jsonl",
        "record.jsonl",
        "result.json",
        "step-000032",
        "step-000040",
    ]
    lines = metrics(result)
    assert [line["step"] for line in lines] == list(range(41))
    assert [line["step"] for line in lines if "held_out" in line] == [0, *range(4, 41, 4)]
    assert lines[-1]["held_out"] == result.losses_after
    assert lines[-1]["tokens"] == result.tokens
    assert np.mean([line["loss"] for line in lines[-5:]]) < lines[1]["loss"] - 0.3
    assert [decision["step"] for decision in read_record(result.record).decisions] == list(range(40))


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_accumulation_is_one_larger_batch(data, tmp_path, family):
    """The gradient of a step is that of all its rows, however they are dealt to micro-batches."""
    model = dataclasses.replace(MODEL, family=family, dropout=0.0)
    # A fixed mixture: a live one would answer to the last bit of the losses.
    config = tiny_config(data, tmp_path / "whole", model=model, policy="natural")
    whole = train(config)
    split = train(dataclasses.replace(config, out=str(tmp_path / "split"), batch_size=2, grad_accumulation_steps=2))
    for name, value in parameters(whole).items():
        torch.testing.assert_close(parameters(split)[name], value, rtol=1e-3, atol=1e-4)
    losses = [[line["loss"] for line in metrics(result)[1:]] for result in (whole, split)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_one_step_is_adamw_on_the_clipped_mean_gradient(data, tmp_path):
    """The whole step written out with plain torch: loss, clipping, decay and learning rate."""
    model = dataclasses.replace(MODEL, dropout=0.0)
    config = tiny_config(data, tmp_path, model=model, steps=1, warmup_steps=3, grad_clip=0.05, policy="natural")
    result = train(config)
    torch.manual_seed(0)
    expected = build_model(dataclasses.replace(model, vocab_size=VOCAB_SIZE, seq_len=16))
    from mixloader import MixLoader

    with MixLoader(data, 4, 16) as loader:
        batch = next(loader)
    loss = torch.nn.functional.cross_entropy(expected(batch["input_ids"]).flatten(0, 1), batch["targets"].flatten())
    loss.backward()
    norm = torch.sqrt(sum(p.grad.square().sum() for p in expected.parameters()))
    assert norm > 0.05
    with torch.no_grad():
        for name, p in expected.named_parameters():
            g = p.grad * 0.05 / norm
            decayed = p * (1 - 0.0025 * 0.1) if p.dim() == 2 else p
            # At the first step the bias-corrected moments are g and g squared.
            expected_value = decayed - 0.0025 * g / (g.abs() + 1e-8)
            torch.testing.assert_close(parameters(result)[name], expected_value, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_resume_is_exact_wherever_the_run_dies(data, tmp_path, monkeypatch, lag):
    """With decisions under way, half a step drawn, feedback waiting and dropout's generator in the state."""
    changes = {"lag": lag, "grad_accumulation_steps": 2, "feedback": True, "batch_size": 2}
    expected = train(tiny_config(data, tmp_path / "whole", **changes))
    for step in (0, 1, 3, 4, 7, 11):
        config = tiny_config(data, tmp_path / f"died-{step}", **changes)
        train_until(config, step, monkeypatch)
        assert_same_run(train(config), expected)
        assert read_record(tmp_path / f"died-{step}" / "record.jsonl").attempts == 2
    config = tiny_config(data, tmp_path / "died-often", **changes)
    for step in (2, 5, 5, 10):
        train_until(config, step, monkeypatch)
    assert_same_run(train(config), expected)


def test_decide_every_and_llama_resume_exactly(data, tmp_path, monkeypatch):
    changes = {"decide_every": 3, "model": dataclasses.replace(MODEL, family="llama", n_kv_head=1)}
    expected = train(tiny_config(data, tmp_path / "whole", **changes))
    config = tiny_config(data, tmp_path / "died", **changes)
    train_until(config, 8, monkeypatch)
    assert_same_run(train(config), expected)


def test_metrics_have_a_line_for_every_evaluation(data, tmp_path):
    lines = metrics(train(tiny_config(data, tmp_path, steps=11, log_every=3, eval_every=4)))
    assert [line["step"] for line in lines] == [0, 3, 4, 6, 8, 9, 11]
    assert [line["step"] for line in lines if "held_out" in line] == [0, 4, 8, 11]
    assert all("loss" in line for line in lines[1:])


def test_bfloat16_trains_in_float32_parameters(data, tmp_path):
    config = tiny_config(data, tmp_path / "bfloat16", dtype="bfloat16", policy="natural")
    result = train(config)
    exact = train(dataclasses.replace(config, out=str(tmp_path / "float32"), dtype="float32"))
    assert all(value.dtype == torch.float32 for value in parameters(result).values())
    assert result.losses_after != exact.losses_after
    assert result.losses_after == pytest.approx(exact.losses_after, abs=0.02)


def test_the_bar_shows_loss_and_speed(data, tmp_path, capfd):
    train(tiny_config(data, tmp_path / "shown"), progress=True)
    shown = capfd.readouterr().err
    assert "768/768" in shown
    assert "tok/s" in shown
    assert "loss " in shown
    train(tiny_config(data, tmp_path / "hidden"))
    assert capfd.readouterr().err == ""


def test_a_finished_run_is_returned_and_left_alone(data, tmp_path):
    config = tiny_config(data, tmp_path)
    result = train(config)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    assert train(config) == result
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # Killed after its last checkpoint and before its result.
    (tmp_path / "result.json").unlink()
    assert train(config) == result


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rate": 0.5}, r"learning_rate = 0.01, but now it is 0.5"),
        ({"steps": 13}, "steps = 12, but now it is 13"),
        ({"policy_options": {"x": 1}}, "policy_options.x = None, but now it is 1"),
        ({"model": dataclasses.replace(MODEL, n_layer=2)}, "model.n_layer = 1, but now it is 2"),
        ({"weights": {"code": 1.0}}, "weights.code = None, but now it is 1.0"),
    ],
)
def test_a_folder_of_another_run_is_refused_by_key(data, tmp_path, monkeypatch, changes, said):
    config = tiny_config(data, tmp_path)
    train_until(config, 5, monkeypatch)
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(StateError, match=said):
        train(dataclasses.replace(config, **changes))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == kept


def test_other_data_are_refused_and_moved_data_are_not(data, tmp_path, monkeypatch):
    config = tiny_config(data, tmp_path / "run")
    train_until(config, 5, monkeypatch)
    shutil.copytree(data.parent, tmp_path / "moved")
    moved = dataclasses.replace(config, data=str(tmp_path / "moved"), checkpoint_every=5, keep_checkpoints=1)
    train_until(moved, 8, monkeypatch)
    manifest = json.loads(data.read_text())
    del manifest["domains"][2]
    (tmp_path / "moved" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StateError, match=r"holds a run with data \(by fingerprint\)"):
        train(moved)


def test_a_run_killed_before_its_first_checkpoint_begins_anew(data, tmp_path, monkeypatch):
    expected = train(tiny_config(data, tmp_path / "whole"))
    config = tiny_config(data, tmp_path / "died")

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(trainer.checkpoints, "save_checkpoint", die)
        with pytest.raises(Killed):
            train(config)
    assert (tmp_path / "died" / "record.jsonl").exists()
    # Nothing was trained, so not even the config has to be the same.
    assert_same_run(train(config), expected)


@pytest.mark.parametrize("keep", ["record.jsonl", "metrics.jsonl", "result.json"])
def test_a_run_without_its_checkpoints_is_not_overwritten(data, tmp_path, keep):
    config = tiny_config(data, tmp_path)
    train(config)
    for path in tmp_path.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != keep:
            path.unlink()
    content = (tmp_path / keep).read_bytes()
    with pytest.raises(StateError, match="holds a run that has trained, but no checkpoint"):
        train(config)
    assert (tmp_path / keep).read_bytes() == content


def test_a_torn_line_of_metrics_is_dropped(data, tmp_path, monkeypatch):
    expected = train(tiny_config(data, tmp_path / "whole"))
    config = tiny_config(data, tmp_path / "died")
    train_until(config, 5, monkeypatch)
    with (tmp_path / "died" / "metrics.jsonl").open("a") as file:
        file.write('{"step":6,"tok')
    assert_same_run(train(config), expected)


def test_two_processes_cannot_train_into_one_folder(data, tmp_path):
    with RunFolder(tmp_path), pytest.raises(StateError, match="another process trains into"):
        train(tiny_config(data, tmp_path))
    assert train(tiny_config(data, tmp_path)).steps == 12


def test_parameters_from_another_run(data, tmp_path):
    base = train(tiny_config(data, tmp_path / "base"))
    result = train(tiny_config(data, tmp_path / "next", init_from=str(tmp_path / "base"), seed=5))
    assert result.losses_before == base.losses_after
    with pytest.raises(StateError, match="holds no checkpoint"):
        train(tiny_config(data, tmp_path / "other", init_from=str(data.parent)))


def test_feedback_only_if_asked(data, tmp_path):
    for asked in (False, True):
        record = read_record(train(tiny_config(data, tmp_path / str(asked), feedback=asked)).record)
        reported = {decision["step"]: decision["feedback"] for decision in record.decisions if "feedback" in decision}
        assert set(reported) == ({0, 4, 8} if asked else set())
        for values in reported.values():
            assert set(values) == {*FIELDS, "source", "target"}
            assert values["source"] == pytest.approx((values["prose"] + values["code"]) / 2, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"data": "no/such/folder"}, ManifestError, "no/such/folder does not exist"),
        ({"model": dataclasses.replace(MODEL, vocab_size=49)}, ConfigError, "model.vocab_size is 49, but the data"),
        ({"device": "cuda:99"}, ConfigError, "device is 'cuda:99'"),
        ({"device": "gpu"}, ConfigError, "device is 'gpu'"),
        ({"policy": "chaise"}, ConfigError, "unknown policy 'chaise'"),
        ({"policy_options": {"x": 1}}, ConfigError, "policy 'chase' cannot be made"),
        ({"weights": {"poetry": 1.0}}, MixLoaderError, "poetry"),
        ({"seq_len": 5000}, ManifestError, "has no shard of 5001 tokens"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(data, tmp_path, changes, error, said):
    config = dataclasses.replace(tiny_config(data, tmp_path / "run"), **changes)
    with pytest.raises(error, match=said):
        train(config)
    assert not list((tmp_path / "run").glob("step-*"))
    assert train(tiny_config(data, tmp_path / "run", steps=1)).steps == 1


def test_an_out_that_cannot_be_written_is_refused(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write to out = "):
        train(tiny_config(data, tmp_path / "file"))


def test_data_that_do_not_say_their_vocabulary(data, tmp_path):
    plain = {name: str(data.parent / name) for name in FIELDS}
    config = dataclasses.replace(tiny_config(data, tmp_path, steps=2), data=plain)
    with pytest.raises(ConfigError, match=r"model.vocab_size is not set, and the data does not say it"):
        train(config)
    assert train(dataclasses.replace(config, model=dataclasses.replace(MODEL, vocab_size=VOCAB_SIZE))).steps == 2
    with pytest.raises(TokenError):
        train(
            dataclasses.replace(
                config, out=str(tmp_path / "small"), model=dataclasses.replace(MODEL, vocab_size=VOCAB_SIZE // 2)
            )
        )


class TestHeldOutLoss:
    @pytest.fixture
    def model(self):
        torch.manual_seed(0)
        return build_model(dataclasses.replace(MODEL, vocab_size=VOCAB_SIZE, seq_len=16))

    def test_is_the_mean_over_every_validation_token(self, data, model):
        manifest = Manifest.open(data)
        model.train()
        losses = held_out_loss(model, manifest, seq_len=16, windows_per_domain=10**6, batch_size=3)
        assert model.training
        model.eval()
        for domain in manifest.domains:
            tokens = torch.from_numpy(read_tokens(domain.validation[0]).astype(np.int64))
            parts = []
            for start in range(0, len(tokens) - 1, 16):
                window = tokens[start : start + 17]
                log_p = model(window[None, :-1])[0].double().log_softmax(-1)
                parts.append(-log_p.gather(1, window[1:, None]))
            assert losses[domain.name] == pytest.approx(torch.cat(parts).mean().item(), rel=1e-6)

    def test_takes_the_same_windows_spread_evenly(self, data, model):
        domain = Manifest.open(data).domains[0]
        tokens = read_tokens(domain.validation[0])
        (batch,) = HeldOut(Manifest.open(data), 4, 16, windows_per_domain=4, domains=[domain.name])
        for x, y, start in zip(batch["input_ids"], batch["targets"], (0, 8, 16, 24), strict=True):
            np.testing.assert_array_equal(x, tokens[start * 16 : start * 16 + 16])
            np.testing.assert_array_equal(y, tokens[start * 16 + 1 : start * 16 + 17])
        first = held_out_loss(model, Manifest.open(data), seq_len=16, windows_per_domain=4)
        assert first == held_out_loss(model, Manifest.open(data), seq_len=16, windows_per_domain=4)

    def test_leaves_out_domains_without_validation(self, data, model):
        manifest = Manifest.open(data)
        domains = (dataclasses.replace(manifest.domains[0], validation=()), *manifest.domains[1:])
        losses = held_out_loss(model, dataclasses.replace(manifest, domains=domains), seq_len=16)
        assert set(losses) == {"code", "maths"}

    def test_refuses_a_token_outside_the_vocabulary(self, data, model):
        with pytest.raises(TokenError, match=r"'prose' hold token .*; expected ids below vocab_size = 30"):
            held_out_loss(model, Manifest.open(data), seq_len=16, vocab_size=30)

    def test_gives_the_mode_back_after_an_error(self, data, model):
        with pytest.raises(ConfigError, match="17 tokens a row"):
            held_out_loss(model, Manifest.open(data), seq_len=17)
        assert model.training
