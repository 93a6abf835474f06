"""Models of transformers here, and ours in transformers: the same logits, or a sentence that says why not."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import VOCAB_SIZE, tiny_config, tiny_data

from mixloader.cli import main
from mixloader.config import ModelConfig
from mixloader.errors import ConfigError, StateError
from mixloader.train.checkpoint import load_model, load_parameters
from mixloader.train.hf_checkpoint import export_hf, fit_config, load_hf_model, read_hf_config
from mixloader.train.model import build_model
from mixloader.train.trainer import train

transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install 'mixloader[hf]')")

CLOSE = {"rtol": 0.0, "atol": 1e-5}  # logits are of the order of 1

GPT = {"vocab_size": VOCAB_SIZE, "n_positions": 24, "n_embd": 16, "n_layer": 2, "n_head": 2}
LLAMA = {
    "vocab_size": VOCAB_SIZE, "max_position_embeddings": 24, "hidden_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "intermediate_size": 20,
}  # fmt: skip
CASES = {
    "gpt2": ("gpt2", {}),
    "gpt2, untied": ("gpt2", {"tie_word_embeddings": False}),
    "gpt2, other sizes": ("gpt2", {"n_inner": 24, "layer_norm_epsilon": 0.01, "activation_function": "gelu"}),
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, grouped queries": ("llama", {"num_key_value_heads": 2, "rms_norm_eps": 0.01}),
    "llama, one key": (
        "llama",
        {"num_key_value_heads": 1, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
    ),
}


@pytest.fixture(params=CASES)
def theirs(request):
    return their_model(*CASES[request.param])


def their_model(kind: str, changes: dict):
    """A random model of transformers, no parameter of which is zero or one as when it begins."""
    torch.manual_seed(0)
    sizes, special = GPT if kind == "gpt2" else LLAMA, {"bos_token_id": 1, "eos_token_id": 2}
    config = transformers.AutoConfig.for_model(kind, **(sizes | special | changes))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def save(model, folder, **options):
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder, **options)
    return folder


def saved(kind: str, folder, **changes):
    return save(their_model(kind, changes), folder)


@torch.no_grad()
def assert_same_logits(ours, theirs, **tolerance) -> None:
    ids = torch.randint(VOCAB_SIZE, (3, 24), generator=torch.Generator().manual_seed(1))
    expected = theirs(input_ids=ids).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(ours.eval()(ids), expected, **tolerance or CLOSE)


def test_a_model_of_transformers_has_its_logits_here(theirs, tmp_path):
    assert_same_logits(load_hf_model(save(theirs, tmp_path / "hf")), theirs)


def test_a_model_goes_there_and_back(theirs, tmp_path):
    ours = load_hf_model(save(theirs, tmp_path / "hf"))
    export_hf(ours, tmp_path / "back", like=tmp_path / "hf")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert back.config.eos_token_id == 2
    assert back.config.tie_word_embeddings == theirs.config.tie_word_embeddings
    for name, value in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    assert_same_logits(load_hf_model(tmp_path / "back"), back)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_a_model_of_ours_has_its_logits_there(tmp_path, family, tied, bias):
    if family == "llama" and bias:
        pytest.skip("it has no biases")
    sizes = {"vocab_size": VOCAB_SIZE, "seq_len": 24, "n_layer": 2, "n_head": 2, "n_embd": 16, "n_inner": 20}
    ours = build_model(ModelConfig(family=family, tie_word_embeddings=tied, bias=bias, **sizes))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    export_hf(ours, tmp_path / "out")
    assert_same_logits(ours, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    export_hf(ours, tmp_path / "half", dtype=torch.bfloat16)
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert half.dtype == torch.bfloat16
    assert_same_logits(load_hf_model(tmp_path / "half"), half.float())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_parameters_in_several_files_and_in_half_precision(tmp_path, kind):
    folder = save(their_model(kind, {}).to(torch.bfloat16), tmp_path / "hf", max_shard_size="4KB")
    assert (folder / "model.safetensors.index.json").exists()
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    # Read again: to() also rounds the rotary frequencies, which from_pretrained does not.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert_same_logits(load_model(folder), theirs)


def test_the_names_of_the_first_gpt2_checkpoints(tmp_path):
    """Those on the hub have no prefix, no head, and the causal masks as buffers."""
    theirs = their_model("gpt2", {})
    folder = save(theirs, tmp_path / "hf")
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(folder / "model.safetensors").items()}
    tensors |= {"h.0.attn.bias": torch.ones(1, 1, 24, 24), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    save_file(tensors, folder / "model.safetensors")
    assert_same_logits(load_hf_model(folder), theirs)


def test_a_config_of_transformers_4(tmp_path):
    folder = saved("llama", tmp_path / "hf", num_key_value_heads=2)
    change_config(folder, rope_parameters=None, rope_theta=2e4, rope_scaling=None, head_dim=None)
    assert read_hf_config(folder).rope_theta == 2e4


def test_a_run_begins_with_a_model_and_ends_as_one(tmp_path, capsys):
    """Trained on from a folder, killed or not, exported by the command line, and read by transformers."""
    data = tiny_data(tmp_path / "data")
    folder = saved("gpt2", tmp_path / "hf")
    (folder / "tokenizer.json").write_text("{}")
    config = tiny_config(data, tmp_path / "run", init_from=str(folder), steps=3, model=ModelConfig(dropout=0.1))
    result = train(config)
    assert result.losses_before != result.losses_after
    assert train(config) == result
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_logits(load_model(tmp_path / "run"), theirs)
    assert theirs.config.bos_token_id == 1
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    assert "choose another folder" in capsys.readouterr().err
    reference = tiny_config(data, tmp_path / "referred", steps=2, reference=str(folder), policy="natural")
    train(reference)


def change_config(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("gpt2", {"model_type": "mistral"}, "type 'mistral'; expected 'gpt2' or 'llama'"),
        ("gpt2", {"activation_function": "relu"}, "activation_function 'relu'; expected one of gelu"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True; only False"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rotary positions are scaled"),
        ("llama", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "positions are scaled"),
        ("llama", {"attention_bias": True}, "attention_bias = True; only False"),
        ("llama", {"head_dim": 8}, "head_dim 8; expected hidden_size / num_attention_heads = 4"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_here_is_said(tmp_path, kind, changes, words):
    folder = saved(kind, tmp_path / "hf")
    change_config(folder, **changes)
    with pytest.raises(ConfigError, match=words):
        load_hf_model(folder)


def test_a_shape_that_the_run_asks_for_must_be_the_models(tmp_path):
    folder = saved("llama", tmp_path / "hf")
    expected = dataclasses.replace(read_hf_config(folder), dropout=0.2)
    assert fit_config(ModelConfig(family="llama", n_embd=16, dropout=0.2), folder) == expected
    with pytest.raises(ConfigError, match=r"model.n_embd is 64, but the model in .* has 16; leave it out"):
        fit_config(ModelConfig(family="llama", n_embd=64), folder)
    data = tiny_data(tmp_path / "data")
    change_config(folder, vocab_size=30)
    with pytest.raises(ConfigError, match=r"model.vocab_size is 30, but the data has ids below 50"):
        train(tiny_config(data, tmp_path / "run", init_from=str(folder), model=ModelConfig()))
    change_config(folder, vocab_size=50)
    with pytest.raises(ConfigError, match=r"seq_len is 25, above model.seq_len = 24"):
        train(tiny_config(data, tmp_path / "run", init_from=str(folder), model=ModelConfig(), seq_len=25))


def damage_nothing_left(folder):
    (folder / "model.safetensors").unlink()
    return "pickled weights are not read"


def damage_missing(folder):
    write(folder, {n: t for n, t in tensors(folder).items() if "ln_f.bias" not in n})
    return r"has no parameter transformer.ln_f.bias"


def damage_unknown(folder):
    write(folder, tensors(folder) | {"transformer.h.9.ln_1.bias": torch.zeros(2)})
    return "holds an unknown parameter transformer.h.9.ln_1.bias"


def damage_shape(folder):
    write(folder, tensors(folder) | {"transformer.h.0.attn.c_attn.weight": torch.zeros(16, 47)})
    return r"c_attn.weight of shape \[16, 47\]; expected \[16, 48\]"


def damage_head(folder):
    write(folder, tensors(folder) | {"lm_head.weight": torch.zeros(VOCAB_SIZE, 16)})
    return "tie_word_embeddings, but its head is not its embedding"


def damage_file(folder):
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    return "cannot read .*model.safetensors"


def damage_index(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "../other.safetensors"}}')
    return "no weight_map from tensors to files beside it"


def damage_index_names(folder):
    names = dict.fromkeys(tensors(folder), "model.safetensors") | {"transformer.wte.bias": "model.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return "holds an unknown parameter transformer.wte.bias"


def damage_index_file(folder):
    shutil.move(folder / "model.safetensors", folder / "a.safetensors")
    names = dict.fromkeys(tensors(folder, "a"), "a.safetensors")
    write(folder, {n: t for n, t in tensors(folder, "a").items() if "wpe" not in n}, "a")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return "has no transformer.wpe.weight, which the index says is there"


def damage_config(folder):
    (folder / "config.json").write_text("{")
    return "cannot read .*config.json"


def tensors(folder, name="model"):
    return load_file(folder / f"{name}.safetensors")


def write(folder, tensors, name="model"):
    save_file(tensors, folder / f"{name}.safetensors")


DAMAGE = [value for name, value in globals().items() if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_named_and_nothing_is_changed(tmp_path, damage):
    folder = saved("gpt2", tmp_path / "hf")
    model = load_hf_model(folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    words = damage(folder)
    with pytest.raises(StateError, match=words):
        load_parameters(folder, model) if damage is not damage_config else load_hf_model(folder)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
