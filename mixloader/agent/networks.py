"""The networks that the agent may have, and what fits ask of each: decisions in rollouts, and how to improve them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mixloader.agent.episodes import mask
from mixloader.agent.network import SetNetwork, load_parameters, read_tensors
from mixloader.agent.rollout import Decide, Rollout, by_parameters
from mixloader.agent.transformer import KIND, HistoryNetwork, Moments, Seen

Network: TypeAlias = SetNetwork | HistoryNetwork


class Kind(NamedTuple):
    """A kind of network.

    new: one from scratch, of the size that is fitted. decide: what decides with its present parameters, in one
    Rollout. numbers: what it answers at some decisions of some episodes of a Rollout that have the same size, float32
    [episodes, decisions, size], differentiable. chosen: the part of the decisions at which its gradient is taken.
    """

    new: Callable[[], Any]
    decide: Callable[[Any], Decide]
    numbers: Callable[[Any, Rollout, np.ndarray, np.ndarray], Tensor]
    chosen: float


def by_history(network: HistoryNetwork) -> Decide:
    """The Transformer, which keeps what it needs of earlier decisions instead of reading them again."""
    moments, kept, past = Moments(), np.zeros(0, dtype=np.int64), None

    @torch.no_grad()
    def decide(rollout: Rollout, t: int) -> np.ndarray:
        nonlocal kept, past
        there = np.arange(len(rollout.episodes.size))
        size = rollout.weights.shape[2]
        numbers, longer = network.go_on(_seen(rollout, there, np.array([t]), size), past)
        kept, before = np.append(kept, t)[moments.add(t + 1.0)], kept
        if len(kept) > len(before):
            past = longer
        elif len(kept) < len(before):
            # What is kept looked at what is now forgotten: it is read again.
            _, past = network.go_on(_seen(rollout, there, kept, size))
        return numbers[:, 0].numpy()

    return decide


def _seen(rollout: Rollout, which: np.ndarray, at: np.ndarray, size: int) -> Seen:
    """What HistoryNetwork is shown of some episodes after the steps `at`, cut to `size` domains."""
    episodes, taken = rollout.episodes, np.ix_(which, at)

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))

    def throughout(array: np.ndarray) -> np.ndarray:
        return np.repeat(array[which, None, :size], len(at), axis=1)

    tokens = np.repeat(at[None] + 1.0, len(which), axis=0)
    return Seen(
        tensor(rollout.domain[taken][:, :, :size]), tensor(rollout.run[taken]),
        tensor(rollout.weights[taken][:, :, :size]), tensor(throughout(episodes.prior)),
        torch.from_numpy(throughout(mask(episodes))), tensor(tokens), tensor(rollout.known_budget()[taken]),
    )  # fmt: skip


def of_histories(network: HistoryNetwork, rollout: Rollout, which: np.ndarray, at: np.ndarray) -> Tensor:
    """As Kind.numbers: a pass over whole runs gives every decision."""
    whole = _seen(rollout, which, np.arange(rollout.steps - 1), int(rollout.episodes.size[which[0]]))
    out: Tensor = network(whole)
    return out[:, torch.from_numpy(at)]


def of_sets(network: SetNetwork, rollout: Rollout, which: np.ndarray, at: np.ndarray) -> Tensor:
    """As Kind.numbers."""
    episodes, taken = rollout.episodes, np.ix_(which, at)
    size, sets = int(episodes.size[which[0]]), len(which) * len(at)

    def part(array: np.ndarray) -> Tensor:
        """[B, T, D, ...] as [sets, size, ...], float32."""
        return torch.from_numpy(array[taken][:, :, :size].reshape(sets, size, *array.shape[3:])).float()

    prior = np.broadcast_to(episodes.prior[:, None], rollout.weights.shape)
    run = torch.from_numpy(rollout.run[taken].reshape(sets, -1))
    there = torch.ones((sets, size), dtype=torch.bool)
    out: Tensor = network(part(rollout.domain), run, part(rollout.weights), part(prior), there)
    return out.view(len(which), len(at), size)


NETWORKS = {
    "set": Kind(SetNetwork, lambda network: by_parameters(network.parameters_as_arrays()), of_sets, chosen=0.25),
    "transformer": Kind(lambda: HistoryNetwork(hidden=48), by_history, of_histories, chosen=1.0),
}
"""Each kind by its name. A part of a run's decisions, chosen anew each time, tells a network of sets nearly as much as
all, since neighbouring ones are alike; the Transformer gives all of them for what the last one costs."""


def kind_of(network: Network) -> Kind:
    """What fits ask of this one."""
    return NETWORKS["set" if isinstance(network, SetNetwork) else KIND]


def load_network(path: Path) -> Network:
    """Whichever network the file of weights is of. Raises StateError for a file that is missing or of neither."""
    if read_tensors(path)[1].get("network") == KIND:
        return HistoryNetwork.load(path)
    return SetNetwork.of(load_parameters(path))
