"""The Llama architecture: RMSNorm, rotary positions, SwiGLU and grouped-query attention, no biases."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixloader.config import ModelConfig
from mixloader.train.model import LanguageModel, attend, split_heads


class Llama(LanguageModel):
    """Touvron et al. 2023, with the grouped queries of Ainslie et al. 2023."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(self.vocab_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=config.eps)
        self.lm_head = nn.Linear(config.n_embd, self.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.wte.weight
        cos, sin = rotary_table(self.seq_len, config.n_embd // config.n_head, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.initialize()

    def forward(self, input_ids: Tensor) -> Tensor:
        self.check_length(input_ids)
        x = self.drop(self.wte(input_ids))
        cos, sin = self.cos[: input_ids.shape[1]], self.sin[: input_ids.shape[1]]
        for block in self.h:
            x = block(x, cos, sin)
        return self.lm_head(self.norm(x))


def rotary_table(seq_len: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position times frequency, float32 [seq_len, head_dim / 2] each (Su et al. 2021).

    Computed in float64: in float32 the angle of position 10^5 is off by up to 0.004.
    """
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + d/2]) of [B, H, T, d] by their angles; pairs as in the released weights on HF."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_1 = nn.RMSNorm(config.n_embd, eps=config.eps)
        self.attn = Attention(config)
        self.norm_2 = nn.RMSNorm(config.n_embd, eps=config.eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm_1(x), cos, sin)
        return x + self.mlp(self.norm_2(x))


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = (config.n_head, config.kv_heads, config.kv_heads)
        head_dim = config.n_embd // config.n_head
        self.sizes = [heads * head_dim for heads in self.heads]
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, sum(self.sizes), bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        parts = self.c_attn(x).split(self.sizes, dim=-1)
        q, k, v = (split_heads(part, heads) for part, heads in zip(parts, self.heads, strict=True))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return self.drop(self.c_proj(attend(q, k, v, self.dropout if self.training else 0.0)))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_gate = nn.Linear(config.n_embd, config.inner, bias=False)
        self.c_fc = nn.Linear(config.n_embd, config.inner, bias=False)
        self.c_proj = nn.Linear(config.inner, config.n_embd, bias=False)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.c_proj(nn.functional.silu(self.c_gate(x)) * self.c_fc(x)))
