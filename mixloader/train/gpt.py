"""The GPT-2 architecture in nanoGPT's form: LayerNorm, GELU, learned positions, tied embeddings."""

from __future__ import annotations

from torch import Tensor, nn

from mixloader.config import ModelConfig
from mixloader.train.model import LanguageModel, attend, split_heads


class GPT(LanguageModel):
    """Radford et al. 2019, with the parameter names of nanoGPT; biases only if the config asks for them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(self.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(self.seq_len, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.eps, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, self.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.wte.weight
        self.initialize()

    def forward(self, input_ids: Tensor) -> Tensor:
        self.check_length(input_ids)
        x = self.drop(self.wte(input_ids) + self.wpe.weight[: input_ids.shape[1]])
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.eps, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.eps, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part, self.n_head) for part in self.c_attn(x).chunk(3, dim=-1))
        return self.drop(self.c_proj(attend(q, k, v, self.dropout if self.training else 0.0)))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.inner, bias=config.bias)
        self.c_proj = nn.Linear(config.inner, config.n_embd, bias=config.bias)
        self.drop = nn.Dropout(config.dropout)
        self.approximate = {"gelu": "none", "gelu_tanh": "tanh"}[config.gelu]

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.c_proj(nn.functional.gelu(self.c_fc(x), approximate=self.approximate)))
