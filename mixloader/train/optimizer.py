"""AdamW with decay on matrices only, and the learning rate of each step."""

from __future__ import annotations

import math

import torch
from torch import nn

from mixloader.config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) over `model`, fused; decay skips biases and norms."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Linear warm-up over `warmup_steps`, then half a cosine down to `min_lr` at the last step, as nanoGPT."""
    low = config.learning_rate / 10 if config.min_lr is None else config.min_lr
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    done = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    return low + (config.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * done))
