"""The agent's network: an MLP over a set of domains (DeepSets, Zaheer et al., arXiv 1703.06114), twice.

`SetNetwork` is torch, for fitting; `forward` is the same arithmetic compiled by numba, for decisions. One set
of parameters serves any number of domains: a domain meets the others only through pools. Two of the three pools
are weighted, by the current weight and by the prior, so that two halves of a domain count as the whole; the
third is the maximum. `forward` sums them as integers: permuting the domains permutes its output bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mixloader.agent.compiled import FIXED_ONE, compiled, fixed
from mixloader.agent.features import DOMAIN_FEATURES, GLOBAL_FEATURES
from mixloader.errors import StateError

HIDDEN = 32
BLOCKS = 2


class Parameters(NamedTuple):
    """Parameters as arrays for `forward`, float32 but for the columns; matrices are [inputs, outputs].

    The network reads P' of the domain's features and G' of the run's; H hidden units, L blocks.
    """

    domain_columns: np.ndarray  # int64 [P'], which of DOMAIN_FEATURES
    run_columns: np.ndarray  # int64 [G'], which of GLOBAL_FEATURES
    low: np.ndarray  # [P' + G'], the range of each feature in training
    high: np.ndarray  # [P' + G']
    centre: np.ndarray  # [P' + G'], features are (x - centre) / scale
    scale: np.ndarray  # [P' + G']
    input_weight: np.ndarray  # [P' + G', H]
    input_bias: np.ndarray  # [H]
    own_weight: np.ndarray  # [L, H, H]
    own_bias: np.ndarray  # [L, H]
    pool_weight: np.ndarray  # [L, 3 H, H]
    out_weight: np.ndarray  # [L, H, H]
    head_weight: np.ndarray  # [H]
    head_bias: np.ndarray  # [1]

    @property
    def features(self) -> list[str]:
        """Names of the features that the network reads, those of a domain first."""
        return [
            *(DOMAIN_FEATURES[column] for column in self.domain_columns),
            *(GLOBAL_FEATURES[column] for column in self.run_columns),
        ]


class Ranges(NamedTuple):
    """What `action.act` asks of a network: which features it reads, and the range of each in training."""

    domain_columns: np.ndarray  # int64 [P'], which of DOMAIN_FEATURES
    run_columns: np.ndarray  # int64 [G'], which of GLOBAL_FEATURES
    low: np.ndarray  # float32 [P' + G']
    high: np.ndarray  # float32 [P' + G']

    @classmethod
    def of(cls, network: nn.Module) -> Ranges:
        """Those of a network that has buffers of these names."""
        return cls(*(getattr(network, name).cpu().numpy() for name in cls._fields))


COLUMNS = ("domain_columns", "run_columns")
"""The arrays of Parameters that stand in a file as names of features, since numbers of columns change."""


def parameter_shapes(inputs: int, hidden: int = HIDDEN, blocks: int = BLOCKS) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the file of weights of a network with so many inputs (P' + G')."""
    square = (blocks, hidden, hidden)
    return {
        "low": (inputs,), "high": (inputs,), "centre": (inputs,), "scale": (inputs,),
        "input_weight": (inputs, hidden), "input_bias": (hidden,), "own_weight": square, "own_bias": (blocks, hidden),
        "pool_weight": (blocks, 3 * hidden, hidden), "out_weight": square, "head_weight": (hidden,), "head_bias": (1,),
    }  # fmt: skip


def feature_columns(features: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """int64 [P'] and [G']: which of DOMAIN_FEATURES and GLOBAL_FEATURES they are. Raises ValueError for others."""
    own = [name for name in features if name in DOMAIN_FEATURES]
    run = [name for name in features if name in GLOBAL_FEATURES]
    if [*own, *run] != list(features) or len(set(features)) != len(features):
        unknown = set(features) - {*own, *run}
        raise ValueError(f"unknown features {sorted(unknown)}" if unknown else "features in another order, or twice")
    return (
        np.array([DOMAIN_FEATURES.index(name) for name in own], dtype=np.int64),
        np.array([GLOBAL_FEATURES.index(name) for name in run], dtype=np.int64),
    )


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of a file of weights (safetensors) and what its metadata says of them.

    metadata: "features", the names of what the network reads; "network", which one it is ("set" if it does not say).
    Raises StateError for a file that is missing or none of the agent's.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = json.loads((file.metadata() or {}).get("mixloader", "{}"))
    except (OSError, SafetensorError) as error:
        raise StateError(
            f"cannot read the agent's weights from {path}: {error}; reinstall mixloader, or make them with "
            "`python -m mixloader.agent.fit`"
        ) from error
    return tensors, metadata


def check_shapes(path: Path, tensors: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises StateError if the tensors of the file are not those."""
    found = {name: tensor.shape for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            raise StateError(
                f"{path} has tensor {name!r} of shape {found.get(name)}; expected {expected.get(name)}: it belongs to "
                "another version of the agent; make weights with `python -m mixloader.agent.fit`"
            )


def read_columns(path: Path, metadata: Mapping[str, Any], inputs: int) -> tuple[np.ndarray, np.ndarray]:
    """The columns of the features that the file names. Raises StateError if they are not known or not so many."""
    features = metadata.get("features", [])
    try:
        own, run = feature_columns(features)
    except ValueError as error:
        raise StateError(
            f"{path} is of a network that reads {error}; it belongs to another version of mixloader, install that one "
            "or make weights with `python -m mixloader.agent.fit`"
        ) from error
    if len(features) != inputs:
        raise StateError(
            f"{path} names {len(features)} features for a network of {inputs} inputs; make weights with "
            "`python -m mixloader.agent.fit`"
        )
    return own, run


def load_parameters(path: Path) -> Parameters:
    """Read a file of weights (safetensors): the network has the size of its tensors, and reads what the file names.

    Raises StateError for a missing file or another network's.
    """
    tensors, metadata = read_tensors(path)
    sizes = [
        tensors[name].shape[0] if name in tensors and tensors[name].ndim else 0
        for name in ("low", "input_bias", "own_weight")
    ]
    check_shapes(path, tensors, parameter_shapes(*sizes))
    own, run = read_columns(path, metadata, sizes[0])
    values = {name: np.ascontiguousarray(tensor, dtype=np.float32) for name, tensor in tensors.items()}
    return Parameters(domain_columns=own, run_columns=run, **values)


def save_parameters(parameters: Parameters, path: Path, **made_with: Any) -> None:
    """Write a file of weights (safetensors), with the features and how it was made as JSON in its metadata."""
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value for name, value in parameters._asdict().items() if name not in COLUMNS}
    # One key: safetensors writes several in random order, and the same fit should give the same bytes.
    described = json.dumps({"features": parameters.features, "fit": made_with})
    save_file(tensors, path, metadata={"mixloader": described})


class SetNetwork(nn.Module):
    """The network in torch, batched and padded. Parameters and buffers bear the names of `Parameters`.

    features: names of those that it reads, of a domain first; all of them by default.
    """

    domain_columns: Tensor
    run_columns: Tensor
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

    def __init__(
        self, features: Sequence[str] = (*DOMAIN_FEATURES, *GLOBAL_FEATURES), hidden: int = HIDDEN, blocks: int = BLOCKS
    ) -> None:
        super().__init__()
        for name, columns in zip(COLUMNS, feature_columns(features), strict=True):
            self.register_buffer(name, torch.from_numpy(columns))
        for name, shape in parameter_shapes(len(features), hidden, blocks).items():
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

    @classmethod
    def of(cls, parameters: Parameters) -> SetNetwork:
        """The network that these are the parameters of."""
        blocks, hidden = parameters.own_bias.shape
        network = cls(parameters.features, hidden, blocks)
        network.load_state_dict({name: torch.from_numpy(value) for name, value in parameters._asdict().items()})
        return network

    def parameters_as_arrays(self) -> Parameters:
        """Copies of its tensors, for the compiled forward pass and for a file."""
        return Parameters(**{name: tensor.detach().cpu().numpy().copy() for name, tensor in self.state_dict().items()})

    @property
    def ranges(self) -> Ranges:
        return Ranges.of(self)

    def save(self, path: Path, **made_with: Any) -> None:
        """Write a file of weights that the policy loads."""
        save_parameters(self.parameters_as_arrays(), path, **made_with)

    def forward(self, domain: Tensor, run: Tensor, weights: Tensor, prior: Tensor, mask: Tensor) -> Tensor:
        """One number a domain.

        domain: float32 [B, D, P], all features; run: [B, G]; weights, prior: [B, D], zero where padded; mask: bool
        [B, D]. Returns float32 [B, D], of no meaning where padded.
        """
        own, common = domain[..., self.domain_columns], run[:, None, self.run_columns]
        features = torch.cat([own, common.expand(-1, domain.shape[1], -1)], dim=-1)
        features = torch.minimum(torch.maximum(features, self.low), self.high)
        hidden = torch.relu(((features - self.centre) / self.scale) @ self.input_weight + self.input_bias)
        absent = ~mask[..., None]
        for block in range(len(self.own_bias)):
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
    split = len(p.domain_columns)
    low, high, centre, scale = p.low, p.high, p.centre, p.scale
    common = p.input_bias.copy()
    for i in range(len(p.run_columns)):
        k = split + i
        value = (min(max(run[p.run_columns[i]], low[k]), high[k]) - centre[k]) / scale[k]
        for j in range(size):
            common[j] += value * p.input_weight[k, j]
    hidden = np.empty((n_domains, size), dtype=np.float32)
    x = np.empty(split, dtype=np.float32)
    inner = np.empty(size, dtype=np.float32)
    for d in range(n_domains):
        for i in range(split):
            x[i] = (min(max(domain[d, p.domain_columns[i]], low[i]), high[i]) - centre[i]) / scale[i]
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
