"""The agent's network: an MLP over a set of domains (DeepSets, Zaheer et al., arXiv 1703.06114), twice.

`SetNetwork` is torch, for fitting; `forward` is the same arithmetic compiled by numba, for decisions. One set
of parameters serves any number of domains: a domain meets the others only through pools. Two of the three pools
are weighted, by the current weight and by the prior, so that two halves of a domain count as the whole; the
third is the maximum. `forward` sums them as integers: permuting the domains permutes its output bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mixloader.agent.compiled import FIXED_ONE, compiled, fixed
from mixloader.agent.features import DOMAIN_FEATURES, GLOBAL_FEATURES
from mixloader.errors import StateError

HIDDEN = 32
BLOCKS = 2


class Parameters(NamedTuple):
    """Parameters as float32 arrays for `forward`; matrices are [inputs, outputs], H = HIDDEN, L = BLOCKS."""

    low: np.ndarray  # [P + G], the range of each feature in training
    high: np.ndarray  # [P + G]
    centre: np.ndarray  # [P + G], features are (x - centre) / scale
    scale: np.ndarray  # [P + G]
    input_weight: np.ndarray  # [P + G, H]
    input_bias: np.ndarray  # [H]
    own_weight: np.ndarray  # [L, H, H]
    own_bias: np.ndarray  # [L, H]
    pool_weight: np.ndarray  # [L, 3 H, H]
    out_weight: np.ndarray  # [L, H, H]
    head_weight: np.ndarray  # [H]
    head_bias: np.ndarray  # [1]


def parameter_shapes() -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the file of weights."""
    inputs = len(DOMAIN_FEATURES) + len(GLOBAL_FEATURES)
    square = (BLOCKS, HIDDEN, HIDDEN)
    return {
        "low": (inputs,), "high": (inputs,), "centre": (inputs,), "scale": (inputs,),
        "input_weight": (inputs, HIDDEN), "input_bias": (HIDDEN,), "own_weight": square, "own_bias": (BLOCKS, HIDDEN),
        "pool_weight": (BLOCKS, 3 * HIDDEN, HIDDEN), "out_weight": square, "head_weight": (HIDDEN,), "head_bias": (1,),
    }  # fmt: skip


def load_parameters(path: Path) -> Parameters:
    """Read a file of weights (safetensors). Raises StateError for a missing file or another network's."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise StateError(
            f"cannot read the agent's weights from {path}: {error}; reinstall mixloader, or make them with "
            "`python -m mixloader.agent.fit`"
        ) from error
    found = {name: tensor.shape for name, tensor in tensors.items()}
    expected = parameter_shapes()
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            raise StateError(
                f"{path} has tensor {name!r} of shape {found.get(name)}; expected {expected.get(name)}: it belongs to "
                "another version of the agent; make weights with `python -m mixloader.agent.fit`"
            )
    return Parameters(**{name: np.ascontiguousarray(tensor, dtype=np.float32) for name, tensor in tensors.items()})


class SetNetwork(nn.Module):
    """The network in torch, batched and padded. Parameters and buffers bear the names of `Parameters`."""

    low: Tensor
    high: Tensor
    centre: Tensor
    scale: Tensor
    input_weight: Tensor
    input_bias: Tensor
    own_weight: Tensor
    own_bias: Tensor
    pool_weight: Tensor
    out_weight: Tensor
    head_weight: Tensor
    head_bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, shape in parameter_shapes().items():
            if name in ("low", "high", "centre", "scale"):
                value = torch.ones(shape) if name == "scale" else torch.zeros(shape)
                self.register_buffer(name, value)
            else:
                fan_in = shape[-2] if len(shape) > 1 and name.endswith("weight") else 1
                bound = (3 / fan_in) ** 0.5 if name.endswith("weight") else 0.0
                self.register_parameter(name, nn.Parameter(torch.empty(shape).uniform_(-bound, bound)))
        with torch.no_grad():
            # The residual form begins as a policy that stays where it is.
            self.out_weight.mul_(0.1)
            self.head_weight.mul_(0.02)

    def forward(self, domain: Tensor, run: Tensor, weights: Tensor, prior: Tensor, mask: Tensor) -> Tensor:
        """One number a domain.

        domain: float32 [B, D, P]; run: [B, G]; weights, prior: [B, D], zero where padded; mask: bool [B, D].
        Returns float32 [B, D], of no meaning where padded.
        """
        features = torch.cat([domain, run[:, None].expand(-1, domain.shape[1], -1)], dim=-1)
        features = torch.minimum(torch.maximum(features, self.low), self.high)
        hidden = torch.relu(((features - self.centre) / self.scale) @ self.input_weight + self.input_bias)
        absent = ~mask[..., None]
        for block in range(BLOCKS):
            by_weight = (weights[..., None] * hidden).sum(1)
            by_prior = (prior[..., None] * hidden).sum(1)
            largest = hidden.masked_fill(absent, 0.0).amax(1)
            pooled = torch.cat([by_weight, by_prior, largest], dim=-1) @ self.pool_weight[block]
            inner = hidden @ self.own_weight[block] + self.own_bias[block] + pooled[:, None]
            hidden = torch.relu(hidden + torch.relu(inner) @ self.out_weight[block])
        return hidden @ self.head_weight + self.head_bias


@compiled
def _linear(x, weight, out):
    """out [O] += x [I] @ weight [I, O]; written so that the inner loop vectorises without re-association."""
    for i in range(len(x)):
        value = x[i]
        if value != 0:
            for j in range(len(out)):
                out[j] += value * weight[i, j]


@compiled
def _pool(hidden, weights, prior):
    """Means by weight and by prior, and the maximum over domains: float32 [3 H]; hidden >= 0."""
    size = hidden.shape[1]
    sums = np.zeros(2 * size, dtype=np.int64)
    pooled = np.zeros(3 * size, dtype=np.float32)
    for d in range(hidden.shape[0]):
        for j in range(size):
            sums[j] += fixed(weights[d] * hidden[d, j])
            sums[size + j] += fixed(prior[d] * hidden[d, j])
            pooled[2 * size + j] = max(pooled[2 * size + j], hidden[d, j])
    for j in range(2 * size):
        pooled[j] = sums[j] / FIXED_ONE
    return pooled


@compiled
def forward(domain, run, weights, prior, p):
    """`SetNetwork.forward` for one run, without padding.

    domain: float32 [D, P]; run: float32 [G]; weights, prior: float64 [D]; p: Parameters. Returns float32 [D].
    """
    n_domains, size = domain.shape[0], len(p.input_bias)
    split = domain.shape[1]
    low, high, centre, scale = p.low, p.high, p.centre, p.scale
    common = p.input_bias.copy()
    for i in range(len(run)):
        k = split + i
        value = (min(max(run[i], low[k]), high[k]) - centre[k]) / scale[k]
        for j in range(size):
            common[j] += value * p.input_weight[k, j]
    hidden = np.empty((n_domains, size), dtype=np.float32)
    x = np.empty(split, dtype=np.float32)
    inner = np.empty(size, dtype=np.float32)
    for d in range(n_domains):
        for i in range(split):
            x[i] = (min(max(domain[d, i], low[i]), high[i]) - centre[i]) / scale[i]
        row = hidden[d]
        row[:] = common
        _linear(x, p.input_weight[:split], row)
        for j in range(size):
            row[j] = max(row[j], np.float32(0))
    for block in range(p.own_weight.shape[0]):
        shared = p.own_bias[block].copy()
        _linear(_pool(hidden, weights, prior), p.pool_weight[block], shared)
        for d in range(n_domains):
            row = hidden[d]
            inner[:] = shared
            _linear(row, p.own_weight[block], inner)
            for j in range(size):
                inner[j] = max(inner[j], np.float32(0))
            _linear(inner, p.out_weight[block], row)
            for j in range(size):
                row[j] = max(row[j], np.float32(0))
    out = np.empty(n_domains, dtype=np.float32)
    for d in range(n_domains):
        total = p.head_bias[0]
        for j in range(size):
            total += hidden[d, j] * p.head_weight[j]
        out[d] = total
    return out
