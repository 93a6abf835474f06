"""The agent as a Transformer decoder over the history of a run: the form of "Data Mixing Agent" (arXiv 2507.15640).

The paper's agent reads the sequence of mixtures and of the feedback on them. Here each domain has a sequence of its
own, of its features at each decision (its weight among them), which a causal attention reads; between the attentions
the domains exchange what they found through the pools of SetNetwork. So one set of parameters serves any number of
domains, and permuting these permutes the output. All is torch, also where decisions are made: it takes milliseconds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from mixloader.agent.features import DOMAIN_FEATURES, GLOBAL_FEATURES
from mixloader.agent.network import COLUMNS, check_shapes, feature_columns, read_columns, read_tensors
from mixloader.errors import StateError
from mixloader.policies.set_network import from_text, to_text

KIND = "transformer"
"""What the metadata of a file of weights says of its network."""

LONGEST = 64
"""Earlier decisions that are remembered; from then on every second of them, and so on."""


class Ranges(NamedTuple):
    """What `action.act` asks of a network: which features it reads, and the range of each in training."""

    domain_columns: np.ndarray  # int64 [P'], which of DOMAIN_FEATURES
    run_columns: np.ndarray  # int64 [G'], which of GLOBAL_FEATURES
    low: np.ndarray  # float32 [P' + G']
    high: np.ndarray  # float32 [P' + G']


class Layer(nn.Module):
    """Attention of each domain to its own past, then what SetNetwork's blocks do at each moment, both residual."""

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm, self.pool_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.query_key_value, self.attended = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        # What lies a whole run back counts exp(-slope) of what is now: some heads look far, others near.
        self.log_slope = nn.Parameter(torch.linspace(0, 3, heads))
        self.own, self.pooled = nn.Linear(hidden, 2 * hidden), nn.Linear(3 * hidden, 2 * hidden, bias=False)
        self.out = nn.Linear(2 * hidden, hidden)

    def forward(self, hidden: Tensor, weights: Tensor, prior: Tensor, since: Tensor, mask: Tensor) -> Tensor:
        """hidden: [B, T, D, H]; weights, prior: [B, T, D]; since: [B, T, T], time between two moments; mask: bool."""
        hidden = hidden + self.attended(self._attend(self.norm(hidden), since, mask))
        normed = self.pool_norm(hidden)
        pools = [
            (weights[..., None] * normed).sum(2),
            (prior[..., None] * normed).sum(2),
            normed.masked_fill(~mask[..., None], -1e4).amax(2),
        ]
        inner = self.own(normed) + self.pooled(torch.cat(pools, dim=-1))[:, :, None]
        return hidden + self.out(torch.relu(inner))

    def _attend(self, normed: Tensor, since: Tensor, mask: Tensor) -> Tensor:
        batch, time, domains, size = normed.shape
        shape = (batch, time, domains, 3, self.heads, size // self.heads)
        query, key, value = self.query_key_value(normed).view(shape).permute(3, 0, 2, 4, 1, 5)  # [B, D, heads, T, .]
        bias = -self.log_slope.exp()[:, None, None] * since[:, None]  # [B, heads, T, T]
        # Only what was before and was there; a moment itself always, so that no row is empty.
        there = mask.transpose(1, 2)[:, :, None] & (since >= 0)[:, None]  # [B, D, T, T]
        there = there | torch.eye(time, dtype=torch.bool, device=mask.device)
        bias = bias[:, None].masked_fill(~there[:, :, None], -torch.inf)
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return mixed.permute(0, 3, 1, 2, 4).reshape(batch, time, domains, size)


class HistoryNetwork(nn.Module):
    """The decoder. features: names of those that it reads, of a domain first; all of them by default.

    low, high, centre, scale: float32 [P' + G'], as in network.Parameters.
    """

    domain_columns: Tensor
    run_columns: Tensor
    low: Tensor
    high: Tensor
    centre: Tensor
    scale: Tensor

    def __init__(
        self,
        features: Sequence[str] = (*DOMAIN_FEATURES, *GLOBAL_FEATURES),
        hidden: int = 64,
        heads: int = 4,
        layers: int = 2,
    ):
        super().__init__()
        self.features, self.heads = list(features), heads
        for name, columns in zip(COLUMNS, feature_columns(features), strict=True):
            self.register_buffer(name, torch.from_numpy(columns))
        for name in ("low", "high", "centre", "scale"):
            self.register_buffer(name, (torch.ones if name == "scale" else torch.zeros)(len(features)))
        self.input = nn.Linear(len(features), hidden)
        self.layers = nn.ModuleList(Layer(hidden, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(hidden), nn.Linear(hidden, 1)
        with torch.no_grad():
            self.head.weight.mul_(0.02)  # it begins as a policy that stays where it is
            self.head.bias.zero_()

    def forward(
        self, domain: Tensor, run: Tensor, weights: Tensor, prior: Tensor, mask: Tensor, time: Tensor
    ) -> Tensor:
        """One number a domain and moment, for the decision of that moment; float32 [B, T, D], of no meaning off `mask`.

        domain: float32 [B, T, D, P], all features; run: [B, T, G]; weights: [B, T, D] in force, zero where padded or
        not there; prior: [B, D]; mask: bool [B, T, D], domains that are there at a moment; time: [B, T], tokens read
        as a part of the budget, ascending. Moments that pad a shorter run have no domain on `mask`.
        """
        own, common = domain[..., self.domain_columns], run[:, :, None, self.run_columns]
        x = torch.cat([own, common.expand(-1, -1, domain.shape[2], -1)], dim=-1)
        x = torch.minimum(torch.maximum(x, self.low), self.high)
        hidden = self.input((x - self.centre) / self.scale)
        since = time[:, :, None] - time[:, None]
        prior = prior[:, None] * mask
        prior = prior / prior.sum(-1, keepdim=True).clamp_min(1e-12)
        for layer in self.layers:
            hidden = layer(hidden, weights, prior, since, mask)
        return self.head(self.norm(hidden))[..., 0]

    @property
    def ranges(self) -> Ranges:
        return Ranges(*(getattr(self, name).cpu().numpy() for name in Ranges._fields))

    def save(self, path: Path, **made_with: Any) -> None:
        """Write a file of weights (safetensors) that the policy loads."""
        from safetensors.torch import save_file

        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.contiguous() for name, value in self.state_dict().items() if name not in COLUMNS}
        described = {"network": KIND, "heads": self.heads, "features": self.features, "fit": made_with}
        save_file(tensors, path, metadata={"mixloader": json.dumps(described)})

    @classmethod
    def load(cls, path: Path) -> HistoryNetwork:
        """Read what `save` wrote. Raises StateError for another file."""
        tensors, metadata = read_tensors(path)
        size = tensors["input.weight"].shape if "input.weight" in tensors else (0, 0)
        layers = len({name.split(".")[1] for name in tensors if name.startswith("layers.")})
        heads = metadata.get("heads", 0)
        if metadata.get("network") != KIND or not layers or heads < 1 or size[0] % heads:
            raise StateError(
                f"{path} is no file of a {KIND} of the agent; expected one that HistoryNetwork.save() wrote"
            )
        read_columns(path, metadata, size[1])
        network = cls(metadata["features"], size[0], heads, layers)
        expected = network.state_dict()
        check_shapes(path, tensors, {k: tuple(v.shape) for k, v in expected.items() if k not in COLUMNS})
        network.load_state_dict({**expected, **{k: torch.from_numpy(v) for k, v in tensors.items()}})
        return network.eval().requires_grad_(False)


class History:
    """What a HistoryNetwork is to know of the earlier decisions of one run; at most LONGEST, at equal tokens.

    In half precision, so that the state of a run with 16 domains has less than 100 KB.
    """

    def __init__(self, network: HistoryNetwork, n_domains: int):
        self._network, self._spacing = network, 0.0
        own, run = len(network.domain_columns), len(network.run_columns)
        self._tokens = np.zeros(0)
        self._domain = np.zeros((0, n_domains, own), dtype=np.float16)
        self._run = np.zeros((0, run), dtype=np.float16)
        self._weights = np.zeros((0, n_domains), dtype=np.float32)

    def extend(self, n_domains: int) -> None:
        """Go on with more domains, which were not there before."""
        more = n_domains - self._weights.shape[1]
        self._domain = np.pad(self._domain, ((0, 0), (0, more), (0, 0)))
        self._weights = np.pad(self._weights, ((0, 0), (0, more)))

    def answer(
        self, domain: np.ndarray, run: np.ndarray, weights: np.ndarray, prior: np.ndarray, tokens: float, budget: float
    ) -> np.ndarray:
        """The network's numbers for a decision, float32 [D], which is remembered from then on.

        domain: float32 [D, P]; run: float32 [G]; weights: float64 [D], sum of 1, 0 for domains that are not there;
        prior: float64 [D]; tokens: read so far.
        """
        network = self._network
        own, common = network.domain_columns.numpy(), network.run_columns.numpy()
        features = np.zeros((len(self._tokens) + 1, len(weights), domain.shape[1]), dtype=np.float32)
        features[:-1, :, own] = self._domain
        features[-1] = domain
        of_run = np.zeros((len(self._tokens) + 1, len(run)), dtype=np.float32)
        of_run[:-1, common] = self._run
        of_run[-1] = run
        in_force = np.vstack([self._weights, weights.astype(np.float32)])
        time = np.append(self._tokens, tokens) / budget
        arrays = (features, of_run, in_force, prior.astype(np.float32), in_force > 0, time.astype(np.float32))
        with torch.inference_mode():
            out = network(*(torch.from_numpy(array)[None] for array in arrays))[0, -1].numpy()
        self._remember(domain[:, own], run[common], in_force[-1], tokens)
        return out

    def _remember(self, domain: np.ndarray, run: np.ndarray, weights: np.ndarray, tokens: float) -> None:
        """Keep it if it is far enough from the last one that was kept, to a millionth of the distance."""
        if len(self._tokens) and tokens - self._tokens[-1] < self._spacing * (1 - 1e-6):
            return
        if len(self._tokens) == 1:
            self._spacing = tokens - self._tokens[0]
        self._tokens = np.append(self._tokens, tokens)
        largest = np.finfo(np.float16).max
        self._domain = np.concatenate([self._domain, np.clip(domain, -largest, largest).astype(np.float16)[None]])
        self._run = np.concatenate([self._run, np.clip(run, -largest, largest).astype(np.float16)[None]])
        self._weights = np.concatenate([self._weights, weights[None]])
        if len(self._tokens) > LONGEST:
            self._spacing *= 2
            self._tokens, self._domain, self._run, self._weights = (
                kept[::2].copy() for kept in (self._tokens, self._domain, self._run, self._weights)
            )

    def state_dict(self) -> dict[str, Any]:
        """JSON-able and exact."""
        return {
            "spacing": self._spacing,
            "tokens": self._tokens.tolist(),
            "domain": to_text(self._domain, "<f2"),
            "run": to_text(self._run, "<f2"),
            "weights": to_text(self._weights),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises StateError for a state of another network or number of domains."""
        kept, domains = len(state["tokens"]), self._weights.shape[1]
        try:
            self._domain = from_text(state["domain"], (kept, *self._domain.shape[1:]), "<f2")
            self._run = from_text(state["run"], (kept, *self._run.shape[1:]), "<f2")
            self._weights = from_text(state["weights"], (kept, domains))
        except ValueError as error:
            raise StateError(
                f"the agent's history does not fit this run of {domains} domains ({error}); resume with the manifest "
                "and the file of weights that the state was saved with"
            ) from error
        self._tokens, self._spacing = np.array(state["tokens"], dtype=np.float64), float(state["spacing"])
