"""Configuration of a training run: two frozen dataclasses, filled from YAML, a dict or `--key value`.

Every way in goes through the same checks: an unknown key is refused with the nearest known one, and a
value of the wrong type or out of range is refused with its key. Paths are relative to the working folder.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mixloader.errors import ConfigError


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a language model.

    family: "gpt" (LayerNorm, GELU, learned positions) or "llama" (RMSNorm, RoPE, SwiGLU, grouped queries).
    vocab_size, seq_len: rows of the embedding and the longest input; None takes the data's and the run's.
    n_layer, n_head, n_embd: blocks, attention heads and width.
    n_kv_head: key and value heads, llama only; None means n_head.
    n_inner: width inside the MLP; None means 4 n_embd for gpt and 8/3 n_embd, rounded up to 64, for llama.
    bias: biases in linear layers and LayerNorm, gpt only.
    dropout: probability after attention, after each residual branch and on the embeddings.
    tie_word_embeddings: one matrix for the embedding and the output.
    rope_theta: base of the rotary frequencies, llama only.
    activation: "gelu" (nanoGPT's, and the default) or "gelu_tanh" (GPT-2's own approximation of it), gpt only.
    norm_eps: what is added to the variance in LayerNorm and RMSNorm; None means 1e-5.
    """

    family: Literal["gpt", "llama"] = "gpt"
    vocab_size: int | None = None
    seq_len: int | None = None
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int | None = None
    n_embd: int = 128
    n_inner: int | None = None
    bias: bool = False
    dropout: float = 0.0
    tie_word_embeddings: bool = True
    rope_theta: float = 10000.0
    # None where nothing is asked for, so that a run of a version without them can be gone on with.
    activation: Literal["gelu", "gelu_tanh"] | None = None
    norm_eps: float | None = None

    def __post_init__(self) -> None:
        check_types(self)
        for key in ("vocab_size", "seq_len", "n_layer", "n_head", "n_kv_head", "n_embd", "n_inner"):
            _at_least(self, key, 1)
        _within(self, "dropout", 0.0, 0.99)
        _at_least(self, "rope_theta", 1.0)
        _at_least(self, "norm_eps", 0.0)
        if self.n_embd % self.n_head:
            raise ConfigError(f"n_embd is {self.n_embd}, which n_head = {self.n_head} does not divide")
        if self.family == "gpt":
            if self.n_kv_head not in (None, self.n_head):
                raise ConfigError(f"n_kv_head is {self.n_kv_head}, but family 'gpt' has n_head = {self.n_head}")
        else:
            if self.n_head % self.kv_heads:
                raise ConfigError(f"n_head is {self.n_head}, which n_kv_head = {self.n_kv_head} does not divide")
            if (self.n_embd // self.n_head) % 2:
                raise ConfigError(f"n_embd / n_head is {self.n_embd // self.n_head}; RoPE needs an even number")
            if self.bias:
                raise ConfigError("bias is true, but family 'llama' has no biases; leave it out")
            if self.activation is not None:
                raise ConfigError(f"activation is {self.activation!r}, but family 'llama' has SwiGLU; leave it out")

    @property
    def kv_heads(self) -> int:
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def inner(self) -> int:
        if self.n_inner is not None:
            return self.n_inner
        return 4 * self.n_embd if self.family == "gpt" else -(-8 * self.n_embd // (3 * 64)) * 64

    @property
    def gelu(self) -> str:
        return self.activation or "gelu"

    @property
    def eps(self) -> float:
        return 1e-5 if self.norm_eps is None else self.norm_eps


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    data: a manifest.json, a folder of shards, or a mapping from domain to path.
    roots: folders outside a manifest's own that it may name shards in.
    out: the run's folder: checkpoints, record.jsonl, metrics.jsonl, result.json.
    seed: of the initial parameters, of dropout and of the order of the data.
    steps: optimizer steps. batch_size: rows a micro-batch, on each process. seq_len: tokens a row.
    grad_accumulation_steps: micro-batches a step.
    policy, policy_options: what decides the mixture ("natural", "uniform", "fixed", "fields", "agent").
    weights: the mixture of the first steps, by domain; None leaves it to the policy.
    act: "sampling", or "objective": the policy weights token losses, and the mixture that is drawn stays.
    guards: bounds on the weights and on the time of the policy, options of Guards: floor, cap, fields, change,
        deadline_s.
    decide_every, lag: steps between decisions, and steps until one takes effect.
    feedback: report held-out losses to the policy.
    answers: probe files (JSON lines) by "source", "target" or domain; the loss of their gold answers is reported in
        place of held-out loss. Text in them needs the tokenizer that the manifest names.
    reference: a run's folder, a checkpoint or a folder of transformers; tokens are compared with the losses of its
        model, for policies that need the excess. In policy_options, reference_losses and target_losses
        may be files of `mixloader score`.
    influence: measure influence for the policy, with these options of Influence ({} for the defaults); None does not.
    record_detail: the run record has all that the policy saw, for learning from it.
    learning_rate, min_lr, warmup_steps: linear warm-up, then a cosine down to min_lr (None: a tenth).
    weight_decay: of matrices only. betas: of AdamW. grad_clip: largest gradient norm, 0 for none.
    eval_every: steps between held-out losses, 0 for only before and after. eval_windows: windows a domain.
    checkpoint_every: steps between checkpoints, 0 for only the last. keep_checkpoints: how many stay.
    log_every: steps between lines of metrics.jsonl; an evaluation writes one, too.
    trackers: "jsonl", "tensorboard", "wandb", any of them: what is told of every decision (trackers.py), in `out`.
    init_from: parameters to start from: a run's folder, a checkpoint or a .safetensors file; or a folder of
        transformers with a GPT-2 or Llama model, whose shape `model` then takes.
    device: "auto", "cpu", "cuda", "cuda:1". dtype: "auto" (bfloat16 autocast on GPUs that have it),
        "float32" or "bfloat16". threads: CPU threads, None leaves them as they are.
    model: a ModelConfig.
    """

    data: Any
    out: str
    roots: list[str] = field(default_factory=list)
    seed: int = 0
    steps: int = 1000
    batch_size: int = 16
    seq_len: int = 256
    grad_accumulation_steps: int = 1
    policy: str = "agent"
    policy_options: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, float] | None = None
    act: Literal["sampling", "objective"] = "sampling"
    guards: dict[str, Any] = field(default_factory=dict)
    decide_every: int = 1
    lag: int = 1
    feedback: bool = False
    answers: dict[str, str] = field(default_factory=dict)
    reference: str | None = None
    influence: dict[str, Any] | None = None
    record_detail: bool = False
    learning_rate: float = 1e-3
    min_lr: float | None = None
    warmup_steps: int = 100
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    eval_every: int = 0
    eval_windows: int = 64
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    log_every: int = 10
    trackers: list[str] = field(default_factory=list)
    init_from: str | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: int | None = None
    model: ModelConfig = field(default_factory=ModelConfig)

    def __post_init__(self) -> None:
        check_types(self)
        if not isinstance(self.data, (str, Path, Mapping)) or not self.data:
            raise ConfigError(f"data is {self.data!r}; expected a manifest.json, a folder of shards or {{name: path}}")
        if not self.out:
            raise ConfigError("out is empty; expected the folder that the run writes to")
        _within(self, "seed", 0, 2**63 - 1)
        for key in ("steps", "batch_size", "seq_len", "grad_accumulation_steps", "decide_every"):
            _at_least(self, key, 1)
        for key in ("eval_windows", "keep_checkpoints", "log_every", "threads"):
            _at_least(self, key, 1)
        for key in ("lag", "warmup_steps", "eval_every", "checkpoint_every"):
            _at_least(self, key, 0)
        for key in ("learning_rate", "min_lr", "weight_decay", "grad_clip"):
            _at_least(self, key, 0.0)
        if self.min_lr is not None and self.min_lr > self.learning_rate:
            raise ConfigError(f"min_lr is {self.min_lr}, above learning_rate = {self.learning_rate}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas are {list(self.betas)}; expected two numbers in [0, 1)")
        if self.answers and not self.feedback:
            raise ConfigError("answers are given, but feedback is false; set it, or leave them out")
        if self.model.seq_len is not None and self.model.seq_len < self.seq_len:
            raise ConfigError(f"seq_len is {self.seq_len}, above model.seq_len = {self.model.seq_len}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """A config from plain values; raises ConfigError, which names the key."""
        known = _known_keys(cls, values)
        required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
        for key in required:
            if key not in known:
                raise ConfigError(f"{key} is missing; add `{key}: ...` to the file or `--{key} ...` to the command")
        return cls(**known)

    @classmethod
    def from_yaml(cls, path: str | Path) -> TrainConfig:
        """A config from a YAML file of keys and values."""
        return cls.load(path, ())

    @classmethod
    def load(cls, path: str | Path | None, overrides: Sequence[str]) -> TrainConfig:
        """A config from a YAML file, if any, and the `--key value` arguments that go over it (`parse_overrides`)."""
        values = {} if path is None else read_yaml(path)
        return cls.from_dict(merge(values, parse_overrides(overrides)))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values, so that `from_dict(to_dict())` is an equal config."""
        values = dataclasses.asdict(self)
        values["betas"] = list(self.betas)
        values["data"] = _plain(self.data)
        return values


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises ConfigError if there is none."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; expected `key: value` lines")
    return values


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`["--steps", "10", "--model.n_layer=4"]` as `{"steps": 10, "model": {"n_layer": 4}}`.

    Values are read as YAML, so that true, null, 1e-3 and [0.9, 0.95] mean what they do in the file.
    """
    import yaml

    nested: dict[str, Any] = {}
    remaining = list(arguments)
    while remaining:
        flag = remaining.pop(0)
        if not flag.startswith("--") or flag == "--":
            raise ConfigError(f"unexpected argument {flag!r}; expected `--key value`")
        key, equals, text = flag[2:].partition("=")
        if not equals:
            if not remaining:
                raise ConfigError(f"--{key} has no value; expected `--{key} value`")
            text = remaining.pop(0)
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"the value of --{key} is {text!r}, which is not YAML") from error
        *parents, leaf = key.split(".")
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"--{key} and --{parent} are both given; keep one")
        inner[leaf] = value
    return nested


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _known_keys(cls: type, values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`values` as keyword arguments of the dataclass `cls`, or a ConfigError for a key it does not have."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix.rstrip('.') or 'the config'} is {values!r}; expected `key: value` pairs")
    names = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            every = [f.name for f in dataclasses.fields(TrainConfig)]
            every += [f"model.{f.name}" for f in dataclasses.fields(ModelConfig)]
            near = max(every, key=lambda known: _likeness(known, f"{prefix}{key}"))
            raise ConfigError(f"unknown key {prefix}{key}; the nearest known key is {near}")
    return dict(values)


def _likeness(known: str, key: str) -> float:
    """How alike two keys are, in [0, 1]; a missing `model.` costs little."""
    whole, last = (known, key), (known.rpartition(".")[2], key.rpartition(".")[2])
    return max(difflib.SequenceMatcher(None, *whole).ratio(), difflib.SequenceMatcher(None, *last).ratio() - 0.01)


def check_types(config: Any) -> None:
    """Bring every field of a frozen dataclass to its annotated type, or raise a ConfigError."""
    for name, hint in typing.get_type_hints(type(config)).items():
        # The classes are frozen for their users, not for their own checks.
        object.__setattr__(config, name, _as_type(name, getattr(config, name), hint))


def _as_type(key: str, value: Any, hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        kinds = [kind for kind in arguments if kind is not type(None)]
        return None if value is None else _as_type(key, value, kinds[0])
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{key} is {value!r}; expected one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(arguments):
            raise ConfigError(f"{key} is {value!r}; expected a list of {len(arguments)} numbers")
        return tuple(_as_type(key, item, kind) for item, kind in zip(value, arguments, strict=True))
    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{key} is {value!r}; expected a list")
        return [_as_type(key, item, arguments[0]) for item in value]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} is {value!r}; expected `name: value` pairs")
        return {str(name): _as_type(f"{key}.{name}", item, arguments[1]) for name, item in value.items()}
    if hint is ModelConfig:
        return value if isinstance(value, ModelConfig) else ModelConfig(**_known_keys(ModelConfig, value, "model."))
    if hint is float:
        return _as_float(key, value)
    if hint is str and isinstance(value, Path):
        return str(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{key} is {value!r}; expected {_NOUNS[hint]}")
    return value


_NOUNS = {int: "a whole number", str: "text", bool: "true or false"}


def _as_float(key: str, value: Any) -> float:
    # YAML 1.1 reads 1e-3, without a dot, as text.
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
    raise ConfigError(f"{key} is {value!r}; expected a finite number")


def _at_least(config: Any, key: str, low: float) -> None:
    value = getattr(config, key)
    if value is not None and value < low:
        raise ConfigError(f"{key} is {value}; expected {low} or more")


def _within(config: Any, key: str, low: float, high: float) -> None:
    value = getattr(config, key)
    if not low <= value <= high:
        raise ConfigError(f"{key} is {value}; expected a value from {low} to {high}")


def _plain(data: Any) -> Any:
    """Paths as text, at any depth."""
    if isinstance(data, Mapping):
        return {str(name): _plain(value) for name, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    return str(data) if isinstance(data, Path) else data
