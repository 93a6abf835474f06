"""Configs from YAML, dicts and the command line: what is accepted, and that every refusal names its key."""

import dataclasses

import pytest

from mixloader.config import ModelConfig, TrainConfig, parse_overrides
from mixloader.errors import ConfigError

MINIMAL = {"data": "shards", "out": "runs/a"}


def test_yaml_and_command_line_meet(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text("data: shards\nout: runs/a\nsteps: 50\nlearning_rate: 1e-3\nmodel:\n  family: llama\n  n_head: 4\n")
    config = TrainConfig.load(
        path, ["--steps", "60", "--model.n_kv_head=2", "--betas", "[0.8, 0.9]", "--policy_options.preference", "0.7"]
    )
    assert config.steps == 60
    assert config.learning_rate == 0.001
    assert config.model == ModelConfig(family="llama", n_head=4, n_kv_head=2)
    assert config.betas == (0.8, 0.9)
    assert config.policy_options == {"preference": 0.7}


def test_to_dict_and_back_is_the_same_config():
    config = TrainConfig(
        data={"a": "x.bin", "b": {"path": ["y", "z"], "field": "target"}},
        out="runs/a",
        weights={"a": 1, "b": 3},
        betas=(0.9, 0.99),
        model=ModelConfig(family="llama", n_kv_head=1),
    )
    assert TrainConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("learning_rte", 1e-3, "unknown key learning_rte; the nearest known key is learning_rate"),
        ("n_layer", 4, "unknown key n_layer; the nearest known key is model.n_layer"),
        ("model", {"n_layers": 4}, "unknown key model.n_layers; the nearest known key is model.n_layer"),
        ("model", 4, "model is 4; expected `key: value` pairs"),
        ("steps", "abc", "steps is 'abc'; expected a whole number"),
        ("steps", 10.0, "steps is 10.0; expected a whole number"),
        ("steps", True, "steps is True; expected a whole number"),
        ("steps", 0, "steps is 0; expected 1 or more"),
        ("lag", -1, "lag is -1; expected 0 or more"),
        ("learning_rate", "fast", "learning_rate is 'fast'; expected a finite number"),
        ("learning_rate", float("nan"), "learning_rate is nan; expected a finite number"),
        ("weight_decay", -0.1, "weight_decay is -0.1; expected 0.0 or more"),
        ("min_lr", 1.0, "min_lr is 1.0, above learning_rate"),
        ("betas", [0.9], r"betas is \[0.9\]; expected a list of 2 numbers"),
        ("betas", [0.9, 1.0], r"betas are \[0.9, 1.0\]; expected two numbers in \[0, 1\)"),
        ("feedback", "yes please", "feedback is 'yes please'; expected true or false"),
        ("weights", {"a": "half"}, "weights.a is 'half'; expected a finite number"),
        ("weights", [1, 2], r"weights is \[1, 2\]; expected `name: value` pairs"),
        ("dtype", "float16", "dtype is 'float16'; expected one of 'auto', 'float32', 'bfloat16'"),
        ("seed", -1, "seed is -1; expected a value from 0"),
        ("data", "", "data is ''; expected a manifest.json"),
        ("data", 3, "data is 3; expected a manifest.json"),
        ("out", "", "out is empty"),
        ("model", {"seq_len": 128}, "seq_len is 256, above model.seq_len = 128"),
        ("model", {"family": "mamba"}, "family is 'mamba'; expected one of 'gpt', 'llama'"),
        ("model", {"n_embd": 130}, "n_embd is 130, which n_head = 4 does not divide"),
        ("model", {"n_kv_head": 2}, "n_kv_head is 2, but family 'gpt' has n_head = 4"),
        ("model", {"family": "llama", "n_kv_head": 3}, "n_head is 4, which n_kv_head = 3 does not divide"),
        ("model", {"family": "llama", "n_embd": 12}, "n_embd / n_head is 3; RoPE needs an even number"),
        ("model", {"family": "llama", "bias": True}, "family 'llama' has no biases"),
        ("model", {"dropout": 1.0}, "dropout is 1.0; expected a value from 0.0 to 0.99"),
    ],
)
def test_refusals_name_the_key(key, value, said):
    with pytest.raises(ConfigError, match=said):
        TrainConfig.from_dict(MINIMAL | {key: value})


@pytest.mark.parametrize("key", ["data", "out"])
def test_a_missing_key_is_named(key):
    with pytest.raises(ConfigError, match=f"^{key} is missing"):
        TrainConfig.from_dict({k: v for k, v in MINIMAL.items() if k != key})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps"], "--steps has no value"),
        (["steps", "3"], "unexpected argument 'steps'"),
        (["--steps", "[1"], "the value of --steps is"),
        (["--model", "gpt", "--model.n_layer", "2"], "--model.n_layer and --model are both given"),
    ],
)
def test_command_line_refusals(arguments, said):
    with pytest.raises(ConfigError, match=said):
        parse_overrides(arguments)


@pytest.mark.parametrize(
    ("text", "said"), [("- 1\n- 2\n", "holds a list; expected"), ("a: [1", "is not YAML"), (None, "cannot read")]
)
def test_files_that_are_no_config(tmp_path, text, said):
    path = tmp_path / "train.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        TrainConfig.from_yaml(path)


def test_every_key_is_explained():
    for cls in (ModelConfig, TrainConfig):
        for field in dataclasses.fields(cls):
            assert field.name in (cls.__doc__ or ""), f"{cls.__name__}.{field.name} has no line in the docstring"
