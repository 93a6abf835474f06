"""The model families against a float64 NumPy reference written from the papers, and their shared interface."""

import itertools
import math

import numpy as np
import pytest
import torch

from mixloader.config import ModelConfig, TrainConfig
from mixloader.errors import ConfigError
from mixloader.train.model import build_model
from mixloader.train.optimizer import build_optimizer, learning_rate_at

SMALL = {"vocab_size": 61, "seq_len": 12, "n_layer": 2, "n_head": 4, "n_embd": 24}
MENAGERIE = [
    ModelConfig(**SMALL),
    ModelConfig(**SMALL, bias=True, tie_word_embeddings=False, n_inner=40),
    ModelConfig(**SMALL, family="llama"),
    ModelConfig(**SMALL, family="llama", n_kv_head=2, rope_theta=500.0),
    ModelConfig(**SMALL, family="llama", n_kv_head=1, tie_word_embeddings=False),
]


def noisy(config: ModelConfig, seed: int = 0) -> torch.nn.Module:
    """A model whose every parameter matters: with the initial ones, norms and biases could be left out unseen."""
    torch.manual_seed(seed)
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def reference(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    """Logits of one row of ids, float64, one head and one position at a time."""
    config = model.config
    p = {name: value.detach().double().numpy() for name, value in model.state_dict().items()}
    x = p["wte.weight"][ids]
    if config.family == "gpt":
        x = x + p["wpe.weight"][: len(ids)]
        norms, last = ("ln_1", "ln_2"), "ln_f"
    else:
        norms, last = ("norm_1", "norm_2"), "norm"
    for layer in range(config.n_layer):
        at = f"h.{layer}."
        h = linear(p, at + "attn.c_attn", norm(p, at + norms[0], x, config))
        x = x + linear(p, at + "attn.c_proj", attention(h, config))
        h = norm(p, at + norms[1], x, config)
        if config.family == "gpt":
            h = linear(p, at + "mlp.c_fc", h)
            h = h * 0.5 * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))
        else:
            gate = linear(p, at + "mlp.c_gate", h)
            h = gate / (1 + np.exp(-gate)) * linear(p, at + "mlp.c_fc", h)
        x = x + linear(p, at + "mlp.c_proj", h)
    return norm(p, last, x, config) @ p["lm_head.weight"].T


def linear(p, name, x):
    return x @ p[name + ".weight"].T + p.get(name + ".bias", 0.0)


def norm(p, name, x, config):
    if config.family == "gpt":
        x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p[name + ".weight"] + p.get(name + ".bias", 0.0)


def attention(h, config):
    d, heads, kv_heads = config.n_embd // config.n_head, config.n_head, config.n_kv_head or config.n_head
    q, k, v = np.split(h, [heads * d, (heads + kv_heads) * d], axis=-1)
    out = np.zeros((len(h), heads * d))
    for head in range(heads):
        kv = head // (heads // kv_heads)
        columns, kv_columns = slice(head * d, (head + 1) * d), slice(kv * d, (kv + 1) * d)
        queries, keys = turned(q[:, columns], config), turned(k[:, kv_columns], config)
        for t in range(len(h)):
            scores = np.exp(keys[: t + 1] @ queries[t] / math.sqrt(d))
            out[t, columns] = scores / scores.sum() @ v[: t + 1, kv_columns]
    return out


def turned(x, config):
    """Rotary positions as multiplication by complex numbers of length 1."""
    if config.family == "gpt":
        return x
    half = x.shape[1] // 2
    z = x[:, :half] + 1j * x[:, half:]
    frequencies = config.rope_theta ** (-np.arange(half) / half)
    z = z * np.exp(1j * np.outer(np.arange(len(x)), frequencies))
    return np.concatenate((z.real, z.imag), axis=1)


@pytest.mark.parametrize("config", MENAGERIE)
def test_logits_are_those_of_the_reference(config):
    model = noisy(config)
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (2, 9))
    logits = model(torch.from_numpy(ids))
    assert logits.shape == (2, 9, config.vocab_size)
    for row, expected in zip(logits.detach().numpy(), ids, strict=True):
        np.testing.assert_allclose(row, reference(model, expected), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("config", MENAGERIE)
def test_a_token_changes_nothing_before_it(config):
    model = noisy(config)
    ids = torch.arange(12)[None]
    changed = ids.clone()
    changed[0, 7] = 60
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("config", MENAGERIE)
def test_every_parameter_gets_a_gradient_and_counts_once(config):
    model = noisy(config)
    model(torch.arange(12)[None]).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    c, v = config.n_embd, config.vocab_size
    embeddings = v * c * (1 if config.tie_word_embeddings else 2)
    if config.family == "gpt":
        block = 4 * c * c + 2 * c * config.inner + 2 * c
        block += (3 * c + c + config.inner + c + 2 * c) if config.bias else 0
        total = embeddings + config.seq_len * c + config.n_layer * block + c * (2 if config.bias else 1)
    else:
        kv = config.kv_heads * (c // config.n_head)
        total = embeddings + config.n_layer * (2 * c * c + 2 * c * kv + 3 * c * config.inner + 2 * c) + c
    assert model.num_params() == total


def test_nanogpt_size():
    """GPT-2 124M without biases: the count that nanoGPT prints, positions included."""
    with torch.device("meta"):
        model = build_model(ModelConfig(vocab_size=50304, seq_len=1024, n_layer=12, n_head=12, n_embd=768))
    assert model.num_params() == 123_587_328 + 1024 * 768


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_initial_parameters_are_nanogpts(family):
    torch.manual_seed(0)
    model = build_model(ModelConfig(family=family, vocab_size=512, seq_len=64, n_layer=8, n_head=4, n_embd=128))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            std = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
    loss = torch.nn.functional.cross_entropy(model(torch.arange(64)[None])[0], torch.arange(64, 128))
    assert loss.item() == pytest.approx(math.log(512), abs=0.2)


def test_dropout_only_in_training():
    model = noisy(ModelConfig(**SMALL, dropout=0.5))
    ids = torch.arange(12)[None]
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_refusals():
    with pytest.raises(ConfigError, match=r"model.vocab_size and model.seq_len must be set"):
        build_model(ModelConfig())
    model = build_model(ModelConfig(**SMALL))
    with pytest.raises(ConfigError, match="13 tokens a row, but the model was built for seq_len = 12"):
        model(torch.zeros(1, 13, dtype=torch.int64))


def test_decay_is_on_matrices_only():
    model = build_model(ModelConfig(**SMALL, bias=True))
    optimizer = build_optimizer(model, TrainConfig(data="d", out="o", weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in model.named_parameters()} == {
        name: 0.3 if p.dim() == 2 else 0.0 for name, p in model.named_parameters()
    }


def test_learning_rate_warms_up_and_follows_a_cosine():
    config = TrainConfig(data="d", out="o", steps=110, warmup_steps=10, learning_rate=1.0, min_lr=0.2)
    rates = [learning_rate_at(step, config) for step in range(110)]
    assert rates[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.6)
    assert rates[-1] == pytest.approx(0.2, abs=1e-3)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[10:]))
    assert learning_rate_at(5, TrainConfig(data="d", out="o", steps=5, warmup_steps=5)) == pytest.approx(1e-3)
