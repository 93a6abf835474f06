"""The agent as a Transformer decoder over the history of a run: the form of "Data Mixing Agent" (arXiv 2507.15640).

The paper's agent reads the sequence of mixtures and of the feedback on them. Here each domain has a sequence of its
own, of its features at each decision (its weight among them), which a causal attention reads; between the attentions
the domains exchange what they found through the pools of SetNetwork. So one set of parameters serves any number of
domains, and permuting these permutes the output. All is torch, also where decisions are made: it takes milliseconds.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mixloader.agent.features import DOMAIN_FEATURES, GLOBAL_FEATURES
from mixloader.agent.network import COLUMNS, Ranges, check_shapes, feature_columns, read_columns, read_tensors
from mixloader.errors import StateError
from mixloader.policies.set_network import from_text, to_text

KIND = "transformer"
"""What the metadata of a file of weights says of its network."""

LONGEST = 64
"""Earlier decisions that are remembered; from then on every second of them, and so on."""


class Moments:
    """Which decisions of a run are remembered: at most LONGEST, at equal tokens.

    tokens: float64 [K], of those that are; spacing: between two of them.
    """

    def __init__(self) -> None:
        self.tokens, self.spacing = np.zeros(0), 0.0

    def add(self, tokens: float) -> np.ndarray:
        """After a decision at so many tokens: which of the remembered ones and, as number K, of it are kept; int64.

        It is if it is far enough from the last one that was, to a millionth of the distance.
        """
        known = len(self.tokens)
        if known and tokens - self.tokens[-1] < self.spacing * (1 - 1e-6):
            return np.arange(known)
        if known == 1:
            self.spacing = tokens - self.tokens[0]
        kept = np.arange(known + 1)
        if len(kept) > LONGEST:
            kept, self.spacing = kept[::2], 2 * self.spacing
        self.tokens = np.append(self.tokens, tokens)[kept]
        return kept


class Stretch(NamedTuple):
    """Decisions from `begin` to before `end` between which nothing is forgotten.

    earlier: int64, all decisions that a later one of the stretch is shown.
    """

    begin: int
    end: int
    earlier: np.ndarray


@functools.cache
def stretches(decisions: int) -> tuple[Stretch, ...]:
    """Those of a run of so many decisions at equal tokens: one, unless there are more than LONGEST before the last."""
    moments, kept, out = Moments(), np.zeros(0, dtype=np.int64), [Stretch(0, 0, np.zeros(0, dtype=np.int64))]
    for number in range(decisions):
        before, kept = kept, np.append(kept, number)[moments.add(number + 1.0)]
        if len(kept) < len(before) or number + 1 == decisions:
            out.append(Stretch(out[-1].end, number + 1, before))
    return tuple(out[1:])


class Seen(NamedTuple):
    """What a HistoryNetwork is shown of T moments of B runs; float32 unless said otherwise.

    domain: [B, T, D, P], all features; run: [B, T, G]; weights: [B, T, D] in force, zero where padded or not there;
    prior: [B, T, D]; mask: bool [B, T, D], domains that are there at a moment; tokens: [B, T], read so far, ascending;
    budget: [B, T], of the run as far as was known then, in the unit of tokens. Padding of a shorter run comes last.
    """

    domain: Tensor
    run: Tensor
    weights: Tensor
    prior: Tensor
    mask: Tensor
    tokens: Tensor
    budget: Tensor


class Past(NamedTuple):
    """What a HistoryNetwork needs of K earlier moments: tokens [B, K], mask bool [B, K, D], and of each layer keys and
    values [B, D, heads, K, H / heads]."""

    tokens: Tensor
    mask: Tensor
    layers: tuple[tuple[Tensor, Tensor], ...]


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

    def forward(
        self,
        hidden: Tensor,
        weights: Tensor,
        prior: Tensor,
        mask: Tensor,
        since: Tensor,
        there: Tensor,
        past: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The next hidden units, and keys and values of the past and of these moments.

        hidden: [B, T, D, H]; weights, prior: [B, T, D]; mask: bool [B, T, D]; since: [B, T, K + T], time from a moment
        back to another; there: bool [B, D, T, K + T], what is looked at; past: keys and values of K earlier moments.
        """
        mixed, past = self._attend(self.norm(hidden), since, there, past)
        hidden = hidden + self.attended(mixed)
        normed = self.pool_norm(hidden)
        pools = [
            (weights[..., None] * normed).sum(2),
            (prior[..., None] * normed).sum(2),
            normed.masked_fill(~mask[..., None], -1e4).amax(2),
        ]
        inner = self.own(normed) + self.pooled(torch.cat(pools, dim=-1))[:, :, None]
        return hidden + self.out(torch.relu(inner)), past

    def _attend(
        self, normed: Tensor, since: Tensor, there: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        batch, time, domains, size = normed.shape
        shape = (batch, time, domains, 3, self.heads, size // self.heads)
        query, key, value = self.query_key_value(normed).view(shape).permute(3, 0, 2, 4, 1, 5)  # [B, D, heads, T, .]
        if past is not None:
            key, value = (torch.cat(pair, dim=3) for pair in zip(past, (key, value), strict=True))
        bias = -self.log_slope.exp()[:, None, None] * since[:, None]  # [B, heads, T, K + T]
        bias = bias[:, None].masked_fill(~there[:, :, None], -torch.inf)
        # Not torch's own: that scales all keys anew for one query, which is most of the work of a decision.
        query = query * (size // self.heads) ** -0.5
        mixed = torch.softmax(query @ key.transpose(-1, -2) + bias, dim=-1) @ value
        return mixed.permute(0, 3, 1, 2, 4).reshape(batch, time, domains, size), (key, value)


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

    def forward(self, seen: Seen) -> Tensor:
        """One number a domain and moment, for the decision of that moment; float32 [B, T, D], of no meaning off `mask`.

        Each moment sees what `History` would show it, if all are at equal tokens: itself, and the earlier ones that
        are remembered then.
        """
        out = []
        for begin, end, earlier in stretches(seen.tokens.shape[1]):
            moments = np.union1d(earlier, np.arange(begin, end))
            shown = torch.from_numpy(np.isin(moments, earlier))
            numbers, _ = self.go_on(Seen(*(part[:, torch.from_numpy(moments)] for part in seen)), shown=shown)
            out.append(numbers[:, begin - end :])
        return torch.cat(out, dim=1)

    def go_on(self, seen: Seen, past: Past | None = None, shown: Tensor | None = None) -> tuple[Tensor, Past]:
        """The numbers [B, T, D] of some moments after a past, and the past of which they are part.

        shown: bool [T], the moments that later ones see, all by default.
        """
        domain, run, weights, prior, mask, tokens, budget = seen
        own, common = domain[..., self.domain_columns], run[:, :, None, self.run_columns]
        x = torch.cat([own, common.expand(-1, -1, domain.shape[2], -1)], dim=-1)
        x = torch.minimum(torch.maximum(x, self.low), self.high)
        hidden = self.input((x - self.centre) / self.scale)
        prior = prior * mask
        prior = prior / prior.sum(-1, keepdim=True).clamp_min(1e-12)
        every, known = tokens, mask
        if past is not None:
            every, known = torch.cat([past.tokens, tokens], dim=1), torch.cat([past.mask, mask], dim=1)
        since = ((tokens[:, :, None] - every[:, None]) / budget[:, :, None]).to(hidden.dtype)
        there = _looked_at(known, tokens.shape[1], shown)
        layers = []
        for number, layer in enumerate(self.layers):
            of_layer = None if past is None else past.layers[number]
            hidden, of_layer = layer(hidden, weights, prior, mask, since, there, of_layer)
            layers.append(of_layer)
        return self.head(self.norm(hidden))[..., 0], Past(every, known, tuple(layers))

    @property
    def ranges(self) -> Ranges:
        return Ranges.of(self)

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


def _looked_at(known: Tensor, time: int, shown: Tensor | None) -> Tensor:
    """What each of the last `time` moments looks at, bool [B, D, T, K + T], of `known` [B, K + T, D].

    Only what was before, was there and is shown; a moment itself always, so that no row is empty.
    """
    each = torch.arange(known.shape[1])
    here = each[-time:, None]
    before = each < here
    if shown is not None:
        before[:, -time:] &= shown
    return (before[..., None] & known[:, None] | (each == here)[..., None]).permute(0, 3, 1, 2)


class History:
    """What a HistoryNetwork is to know of the earlier decisions of one run; at most LONGEST, at equal tokens.

    In half precision, so that the state of a run with 16 domains has less than 100 KB.
    """

    def __init__(self, network: HistoryNetwork, n_domains: int):
        self._network, self._moments = network, Moments()
        own, run = len(network.domain_columns), len(network.run_columns)
        self._budget = np.zeros(0)
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
        prior: float64 [D]; tokens: read so far; budget: of the run, as far as is known.
        """
        network, count = self._network, len(self._budget) + 1
        own, common = network.domain_columns.numpy(), network.run_columns.numpy()
        features = np.zeros((count, len(weights), domain.shape[1]), dtype=np.float32)
        features[:-1, :, own] = self._domain
        features[-1] = domain
        of_run = np.zeros((count, len(run)), dtype=np.float32)
        of_run[:-1, common] = self._run
        of_run[-1] = run
        in_force = np.vstack([self._weights, weights.astype(np.float32)])
        when = np.append(self._moments.tokens, tokens), np.append(self._budget, budget)
        priors = np.repeat(prior[None].astype(np.float32), count, axis=0)
        arrays = (features, of_run, in_force, priors, in_force > 0, *when)
        with torch.inference_mode():
            out = network(Seen(*(torch.from_numpy(array)[None] for array in arrays)))[0, -1].numpy()
        self._remember(domain[:, own], run[common], in_force[-1], tokens, budget)
        return out

    def _remember(self, domain: np.ndarray, run: np.ndarray, weights: np.ndarray, tokens: float, budget: float) -> None:
        kept, largest = self._moments.add(tokens), np.finfo(np.float16).max
        self._budget = np.append(self._budget, budget)[kept]
        self._domain, self._run, self._weights = (
            np.concatenate([before, np.clip(new, -largest, largest).astype(before.dtype)[None]])[kept]
            for before, new in ((self._domain, domain), (self._run, run), (self._weights, weights))
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON-able and exact."""
        return {
            "spacing": self._moments.spacing,
            "tokens": self._moments.tokens.tolist(),
            "budget": self._budget.tolist(),
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
        self._budget = np.array(state["budget"], dtype=np.float64)
        self._moments.tokens, self._moments.spacing = np.array(state["tokens"], dtype=np.float64), state["spacing"]
