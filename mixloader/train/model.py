"""One interface to the model families: a config in, a module out that maps token ids to logits."""

from __future__ import annotations

import math

from torch import Tensor, nn

from mixloader.config import ModelConfig
from mixloader.errors import ConfigError


class LanguageModel(nn.Module):
    """A causal language model. `forward(input_ids)`: int64 [B, T] to logits [B, T, vocab_size].

    Logits have the dtype of the matrix products (bfloat16 under autocast, else float32).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size is None or config.seq_len is None:
            raise ConfigError(
                "model.vocab_size and model.seq_len must be set; a model alone cannot take them from data"
            )
        self.config, self.vocab_size, self.seq_len = config, config.vocab_size, config.seq_len

    def num_params(self) -> int:
        """Distinct parameters; tied matrices count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def initialize(self) -> None:
        """As nanoGPT: normal(0, 0.02), zero biases, and 0.02 / sqrt(2 n_layer) where a branch joins the residual."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() < 2:
                nn.init.ones_(parameter)
            elif name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layer))
            else:
                nn.init.normal_(parameter, std=0.02)

    def check_length(self, input_ids: Tensor) -> None:
        if input_ids.shape[1] > self.seq_len:
            raise ConfigError(
                f"the input has {input_ids.shape[1]} tokens a row, but the model was built for seq_len = "
                f"{self.seq_len}; shorten the rows or build a model with a longer seq_len"
            )


def build_model(config: ModelConfig) -> LanguageModel:
    """A freshly initialized model on the CPU in float32; draws from torch's global generator.

    Raises ConfigError if `config.vocab_size` or `config.seq_len` is still None.
    """
    from mixloader.train.gpt import GPT
    from mixloader.train.llama import Llama

    return GPT(config) if config.family == "gpt" else Llama(config)


def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Causal attention. q: [B, H, T, d]; k, v: [B, H or fewer, T, d]. Returns [B, T, H d]."""
    y = nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, dropout_p=dropout, enable_gqa=k.shape[1] != q.shape[1]
    )
    return y.transpose(1, 2).flatten(2)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, H d] to [B, H, T, d], without a copy."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
