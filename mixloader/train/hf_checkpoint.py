"""Checkpoints of Hugging Face's GPT-2 and Llama models: read into models of this package, and written from them.

A folder of transformers holds config.json and model.safetensors, or model.safetensors.index.json and the files that it
names. Logits are those of transformers up to rounding: in float32 on a CPU within 1e-5 of the largest.
Nothing here needs transformers.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mixloader.config import ModelConfig
from mixloader.errors import ConfigError, StateError
from mixloader.files import sync
from mixloader.train.model import LanguageModel, build_model

_ARCHITECTURES = {"gpt": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}
_PREFIXES = {"gpt": "transformer.", "llama": "model."}
_HEAD = "lm_head.weight"
# Older versions of transformers saved these, which are no parameters.
_BUFFERS = re.compile(r".*\.attn\.(masked_)?bias|.*rotary_emb\.inv_freq")
# Beside the parameters: what else a folder of transformers holds that an exported model needs.
_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template*",
)
_GELUS: dict[str, Literal["gelu", "gelu_tanh"]] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def is_hf_folder(path: Path) -> bool:
    """Whether `path` is a folder as transformers saves models to."""
    return (path / "config.json").is_file()


# Configurations


def read_hf_config(folder: Path) -> ModelConfig:
    """The shape of the model in a folder of transformers; raises ConfigError if it is none that this package has.

    Its dropout is left out: that is a choice of the training to come.
    """
    values = _read_json(folder / "config.json")
    kind = values.get("model_type")
    if kind not in ("gpt2", "llama"):
        raise ConfigError(f"{folder} holds a model of type {kind!r}; expected 'gpt2' or 'llama'")
    try:
        return _gpt_config(values, folder) if kind == "gpt2" else _llama_config(values, folder)
    except KeyError as error:
        raise ConfigError(f"{folder / 'config.json'} has no {error}; expected the config of a {kind} model") from error


def fit_config(model: ModelConfig, folder: Path) -> ModelConfig:
    """The shape of the model in `folder`, with the dropout of `model`.

    Raises ConfigError if `model` asks for something else, by a value that is not the default.
    """
    found = read_hf_config(folder)
    default = ModelConfig()
    for key in (field.name for field in fields(ModelConfig) if field.name != "dropout"):
        value, theirs = getattr(model, key), getattr(found, key)
        if value not in (getattr(default, key), theirs):
            raise ConfigError(f"model.{key} is {value!r}, but the model in {folder} has {theirs!r}; leave it out")
    return replace(found, dropout=model.dropout)


def _gpt_config(values: Mapping[str, Any], folder: Path) -> ModelConfig:
    _refuse_unless(
        values, folder, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False
    )
    activation = values.get("activation_function", "gelu_new")
    if activation not in _GELUS:
        raise ConfigError(
            f"{folder} holds a model with activation_function {activation!r}; expected one of {', '.join(_GELUS)}"
        )
    return ModelConfig(
        family="gpt",
        vocab_size=values["vocab_size"],
        seq_len=values["n_positions"],
        n_layer=values["n_layer"],
        n_head=values["n_head"],
        n_embd=values["n_embd"],
        n_inner=values.get("n_inner"),
        bias=True,
        tie_word_embeddings=values.get("tie_word_embeddings", True),
        activation=_GELUS[activation],
        norm_eps=values.get("layer_norm_epsilon", 1e-5),
    )


def _llama_config(values: Mapping[str, Any], folder: Path) -> ModelConfig:
    _refuse_unless(values, folder, hidden_act="silu", attention_bias=False, mlp_bias=False)
    # transformers 5 has rope_parameters, those before it rope_theta and rope_scaling.
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            f"{folder} holds a model whose rotary positions are scaled ({json.dumps(rope)}); only unscaled ones, of "
            "rope_type 'default', can be trained here"
        )
    width, heads = values["hidden_size"], values["num_attention_heads"]
    if values.get("head_dim") not in (None, width // heads):
        raise ConfigError(
            f"{folder} holds a model with head_dim {values['head_dim']}; expected hidden_size / num_attention_heads = "
            f"{width // heads}"
        )
    return ModelConfig(
        family="llama",
        vocab_size=values["vocab_size"],
        seq_len=values["max_position_embeddings"],
        n_layer=values["num_hidden_layers"],
        n_head=heads,
        n_kv_head=values.get("num_key_value_heads") or heads,
        n_embd=width,
        n_inner=values["intermediate_size"],
        tie_word_embeddings=values.get("tie_word_embeddings", False),
        rope_theta=rope.get("rope_theta", values.get("rope_theta", 10000.0)),
        norm_eps=values.get("rms_norm_eps", 1e-6),
    )


def _refuse_unless(values: Mapping[str, Any], folder: Path, **expected: Any) -> None:
    for key, value in expected.items():
        if values.get(key, value) != value:
            raise ConfigError(
                f"{folder} holds a model with {key} = {values[key]!r}; only {value!r} can be trained here"
            )


def _hf_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json for a model of `config`, as transformers 4 and 5 read it."""
    common = {
        "architectures": [_ARCHITECTURES[config.family]],
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if config.family == "gpt":
        return common | {
            "model_type": "gpt2",
            "n_positions": config.seq_len,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_embd": config.n_embd,
            "n_inner": config.inner,
            "activation_function": next(name for name, ours in _GELUS.items() if ours == config.gelu),
            "layer_norm_epsilon": config.eps,
            **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout),
        }
    return common | {
        "model_type": "llama",
        "max_position_embeddings": config.seq_len,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "hidden_size": config.n_embd,
        "intermediate_size": config.inner,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": config.eps,
        "rope_theta": config.rope_theta,
    }


# Parameters


@dataclass(frozen=True)
class _Place:
    """Where a parameter of ours is in a folder of transformers: `names`, one below the other.

    transposed: as GPT-2's linear layers are, [in, out]. sizes: rows of each part.
    """

    names: tuple[str, ...]
    transposed: bool = False
    sizes: tuple[int, ...] = ()


_LLAMA_NAMES = {
    "wte": "embed_tokens",
    "norm_1": "input_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "norm_2": "post_attention_layernorm",
    "mlp.c_gate": "mlp.gate_proj",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
    "norm": "norm",
}


def _place(name: str, config: ModelConfig) -> _Place:
    """Of our parameter `name`; names are those that transformers gives them, with the prefix of the family."""
    if name == _HEAD:
        return _Place((name,))
    prefix = _PREFIXES[config.family]
    if config.family == "gpt":
        return _Place((prefix + name,), transposed=".c_" in name and name.endswith("weight"))
    block = re.match(r"h\.(\d+)\.", name)
    below = name.removesuffix(".weight") if block is None else name[block.end() :].removesuffix(".weight")
    prefix += "" if block is None else f"layers.{block[1]}."
    if below == "attn.c_attn":
        head_dim = config.n_embd // config.n_head
        sizes = tuple(heads * head_dim for heads in (config.n_head, config.kv_heads, config.kv_heads))
        return _Place(tuple(f"{prefix}self_attn.{part}_proj.weight" for part in "qkv"), sizes=sizes)
    return _Place((f"{prefix}{_LLAMA_NAMES[below]}.weight",))


def load_hf_parameters(folder: Path, model: nn.Module) -> None:
    """Copy the parameters in a folder of transformers into a LanguageModel, from any dtype.

    Raises StateError, and changes nothing, if one is missing, left over or of another shape.
    """
    if not isinstance(model, LanguageModel):
        raise ConfigError(f"{folder} is a folder of transformers, which a {type(model).__name__} cannot be filled from")
    config = model.config
    found = _Files(folder, _PREFIXES[config.family])
    places = {name: _place(name, config) for name, _ in model.named_parameters()}
    expected = {part for place in places.values() for part in place.names}
    _check_tied(found, config)
    for name in sorted(expected ^ set(found.files)):
        if name != _HEAD or not config.tie_word_embeddings:
            what = "has no" if name in expected else "holds an unknown"
            raise StateError(f"{folder} {what} parameter {name}; expected those of a {_ARCHITECTURES[config.family]}")
    for name, parameter in model.named_parameters():
        place = places[name]
        shapes = [parameter.shape] if not place.sizes else [torch.Size((n, parameter.shape[1])) for n in place.sizes]
        for part, shape in zip(place.names, shapes, strict=True):
            _check_shape(found, part, list(reversed(shape) if place.transposed else shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = torch.cat([found.read(part) for part in places[name].names])
            parameter.copy_(value.T if places[name].transposed else value)


def _check_shape(found: _Files, name: str, expected: list[int]) -> None:
    if (shape := found.shape(name)) != expected:
        raise StateError(
            f"{found.folder} holds {name} of shape {shape}; expected {expected}; its config.json is of another model"
        )


def load_hf_model(folder: Path) -> LanguageModel:
    """The model in a folder of transformers, float32 on the CPU; torch's generators stay as they are."""
    with torch.random.fork_rng(devices=[]):
        model = build_model(read_hf_config(folder))
    load_hf_parameters(folder, model)
    return model


class _Files:
    """The tensors of a folder, by the name that a model with a head gives them."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder = folder
        names = self._names()
        # A model saved without its head has no prefix.
        bare = not any(name.startswith(prefix) for name in names)
        self.files = {
            prefix + name if bare and name != _HEAD else name: (name, file)
            for name, file in names.items()
            if not _BUFFERS.fullmatch(name)
        }

    def _names(self) -> dict[str, str]:
        """Name of each tensor, and of its file."""
        index = self.folder / "model.safetensors.index.json"
        if not index.exists():
            if not (self.folder / "model.safetensors").exists():
                raise StateError(
                    f"{self.folder} has a config.json, but neither model.safetensors nor {index.name}; pickled weights "
                    "are not read: load them with transformers and save them with save_pretrained()"
                )
            with self._open("model.safetensors") as file:
                return dict.fromkeys(file.keys(), "model.safetensors")
        names = _read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(
            isinstance(file, str) and Path(file).name == file for file in names.values()
        ):
            raise StateError(f"{index} has no weight_map from tensors to files beside it; its download may be damaged")
        return names

    def read(self, name: str) -> Tensor:
        stored, file = self.files[name]
        with self._open(file) as tensors:
            return tensors.get_tensor(stored)

    def shape(self, name: str) -> list[int]:
        """Raises StateError if the file that the index names does not have it."""
        stored, file = self.files[name]
        with self._open(file) as tensors:
            if stored not in tensors.keys():  # noqa: SIM118 (no mapping)
                raise StateError(f"{self.folder / file} has no {stored}, which the index says is there")
            return tensors.get_slice(stored).get_shape()

    def _open(self, file: str) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.folder / file, "pt")
        except (OSError, SafetensorError) as error:
            raise StateError(f"cannot read {self.folder / file}: {error}; download or save it again") from error


def _check_tied(found: _Files, config: ModelConfig) -> None:
    """A tied head that was saved all the same must be the embedding."""
    if config.tie_word_embeddings and _HEAD in found.files:
        embedding = _place("wte.weight", config).names[0]
        if embedding in found.files and not torch.equal(found.read(_HEAD), found.read(embedding)):
            raise StateError(
                f"{found.folder} has tie_word_embeddings, but its head is not its embedding; write false in its "
                "config.json to have both"
            )


# Export


def export_hf(model: LanguageModel, out: Path, *, like: Path | None = None, dtype: torch.dtype = torch.float32) -> None:
    """Write `model` to the folder `out`, which must not exist yet, for `from_pretrained` of transformers.

    like: a folder of transformers, whose tokenizer is copied and whose special tokens are kept. dtype: of the
    parameters. A GPT without biases is written with biases of zero, as GPT-2 has them.
    Raises StateError, and leaves nothing behind, if it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if out.exists():
        raise StateError(f"{out} is there already; choose another folder, or move it away")
    temporary = out.with_name(f".{out.name}.tmp")
    config = _hf_config(model.config, dtype)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        if like is not None:
            theirs = _read_json(like / "config.json")
            config |= {key: theirs[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in theirs}
            for pattern in _COMPANIONS:
                for path in filter(Path.is_file, like.glob(pattern)):
                    shutil.copyfile(path, temporary / path.name)
        tensors = {name: value.to(dtype).contiguous() for name, value in _hf_tensors(model)}
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        temporary.rename(out)
        sync(out.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise StateError(f"cannot write {out}: {error}") from error


def _hf_tensors(model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        place, value = _place(name, model.config), parameter.detach().cpu()
        value = value.T if place.transposed else value
        yield from zip(place.names, value.split(place.sizes) if place.sizes else [value], strict=True)
    if model.config.family == "gpt" and not model.config.bias:
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, nn.LayerNorm)) and f"{name}.weight" != _HEAD:
                yield _place(f"{name}.bias", model.config).names[0], torch.zeros(module.weight.shape[0])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StateError(f"cannot read {path}: {error}; expected JSON as transformers writes it") from error
    if not isinstance(values, dict):
        raise StateError(f"{path} holds a {type(values).__name__}; expected an object as transformers writes it")
    return values
