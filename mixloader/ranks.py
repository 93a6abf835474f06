"""Ranks: the processes that train one model together, as a Mixer sees them.

Sums of losses and sketches are added where the tensors are, by the process group of the training. All that is small
and must be the same everywhere goes over a gloo group of the Mixer's own, as JSON: what rank 0 decided, what a state
holds, what each rank was given. Every method here is a collective: all ranks call it, in the same order.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from mixloader.errors import ConfigError, RankError
from mixloader.layout import mesh_members
from mixloader.mixture import WEIGHT_ONE

if TYPE_CHECKING:
    from mixloader.loader import MixLoader

T = TypeVar("T")
_ALL = "digest of the rest"

_MESSAGE = 4096  # bytes of a broadcast; what is longer takes a second one
_DIGEST_BITS = 22  # so that a sum of squares over 2^19 ranks fits 63 bits


class Ranks:
    """All processes that must stand at the same place of one plan.

    members: their global ranks, first the one that leads: the policy, the record and warnings are there. By default
        this process is alone. sums: the group over which statistics are added up; None where there is one process to
        a row. timeout: of the messages; by default torch.distributed's for gloo, 30 minutes.
    """

    def __init__(
        self, members: Sequence[int] = (), sums: dist.ProcessGroup | None = None, timeout: timedelta | None = None
    ):
        self.members, self.sums = tuple(members), sums
        self.alone = len(self.members) < 2
        self.leads = self.alone or dist.get_rank() == self.members[0]
        self._control: dist.ProcessGroup | None = None
        if self.alone:
            return
        if not dist.is_gloo_available():
            raise ConfigError("this torch has no gloo, which ranks exchange decisions with; use one that has")
        # A group of its own, as the policy's thread uses it while gradients are on their way in others.
        part = len(self.members) < dist.get_world_size()
        self._control = dist.new_group(list(self.members), timeout, "gloo", use_local_synchronization=part)

    @classmethod
    def of(cls, loader: MixLoader, device: torch.device, group: dist.ProcessGroup | None = None) -> Ranks:
        """Those that draw from the plan of `loader`. device: where their statistics are.

        With a mesh, the statistics are added over its data dimensions, and all of its ranks follow one decision.
        """
        if loader.mesh is not None:
            if group is not None:
                raise ConfigError("the loader was made with a mesh, which says the ranks already; leave out group=")
            mine, members = mesh_members(loader.mesh, loader.mesh_dims)
            if len(members) == 1:
                return cls()
            whole = len(mine) == dist.get_world_size()
            sums = dist.group.WORLD if whole else dist.new_group(mine, use_local_synchronization=True)
            return cls(members, sums if len(mine) > 1 else None, _timeout(dist.group.WORLD))
        if loader.world_size == 1 and group is None:
            return cls()
        if not (dist.is_available() and dist.is_initialized()):
            raise ConfigError(
                f"the loader has world_size {loader.world_size}, but there is no process group to add its ranks' "
                "losses up; call torch.distributed.init_process_group() first, under torchrun"
            )
        group = dist.group.WORLD if group is None else group
        assert group is not None
        found, expected = (dist.get_rank(group), dist.get_world_size(group)), (loader.rank, loader.world_size)
        if found != expected:
            raise ConfigError(
                f"the loader is rank {expected[0]} of {expected[1]}, but this process is rank {found[0]} of {found[1]} "
                "in the process group; give the Mixer the group= that the loader's ranks are of"
            )
        backends = dist.get_backend_config(group)
        if f"{device.type}:" not in backends:
            raise ConfigError(
                f"the statistics are on device {device.type!r}, and the process group takes no tensors there "
                f"({backends}); give the Mixer the device= of the logits, or a group= with a backend for it"
            )
        return cls(dist.get_process_group_ranks(group), group, _timeout(group))

    def close(self) -> None:
        if self._control is not None and dist.is_initialized():
            dist.destroy_process_group(self._control)
        self._control = None

    def gather(self, value: Any) -> dict[int, Any]:
        """The JSON-able `value` of each rank, by global rank."""
        if self.alone:
            return {0: value}
        payload = _encode(value)
        with self.hearing("a message of each"):
            lengths = [torch.zeros(1, dtype=torch.int64) for _ in self.members]
            dist.all_gather(lengths, torch.tensor([len(payload)]), group=self._control)
            most = max(int(length) for length in lengths)
            texts = [torch.zeros(most, dtype=torch.uint8) for _ in self.members]
            dist.all_gather(texts, _padded(payload, most), group=self._control)
        parts = [_decode(text[: int(length)]) for text, length in zip(texts, lengths, strict=True)]
        return dict(zip(sorted(self.members), parts, strict=True))  # torch sorts the ranks of a group

    def told(self, make: Callable[[], T]) -> T:
        """What `make` gives on the rank that leads, on all ranks; the others get it as JSON, and do not run theirs.

        Raises what `make` raised there, and RankError on the others.
        """
        if self.alone:
            return make()
        if not self.leads:
            message = _decode(self._broadcast(b""))
            if "failed" in message:
                raise RankError(f"rank {self.members[0]} failed: {message['failed']}")
            return message["told"]
        try:
            answer = make()
            payload = _encode({"told": answer})
        except BaseException as error:
            self._broadcast(_encode({"failed": f"{type(error).__name__}: {error}"}))
            raise
        self._broadcast(payload)
        return answer

    def agree(self, make: Callable[[], Mapping[str, Any]], where: str) -> None:
        """See that `make`, run on each rank, gives the same JSON-able values on all.

        Raises what it raised on this rank, and RankError if it failed on another, or if a value differs.
        """
        if self.alone:
            make()
            return
        try:
            facts = make()
        except Exception as error:
            self.gather({"failed": f"{type(error).__name__}: {error}"})
            raise
        found = self.gather({"facts": facts})
        for rank, values in found.items():
            if "failed" in values:
                raise RankError(f"rank {rank} failed {where}: {values['failed']}")
        raise_difference({rank: values["facts"] for rank, values in found.items()}, where)

    def alike(self, plan: Any, count: int) -> tuple[bool, int]:
        """Whether all ranks have the same JSON-able `plan`, by a digest, and the sum of their counts."""
        digest = _digest(plan)
        marks = torch.tensor([digest, digest * digest, count])
        with self.hearing("a digest of the plan of each"):
            dist.all_reduce(marks, group=self._control)
        total, squares, counts = marks.tolist()
        # n sum(h²) = (sum h)² if and only if all are equal, so all ranks come to the same conclusion.
        return len(self.members) * squares == total * total, counts

    @contextmanager
    def hearing(self, what: str) -> Iterator[None]:
        """Errors of communication inside say what was waited for."""
        try:
            yield
        except RuntimeError as error:
            if self.alone or isinstance(error, RankError):
                raise
            raise RankError(
                f"rank {dist.get_rank()} waited for {what} of {len(self.members)} ranks, and it did not come: {error}. "
                "Another rank has died or is stuck; look at what it printed"
            ) from error

    def _broadcast(self, payload: bytes) -> bytes:
        """`payload` of the rank that leads."""
        source, size = self.members[0], torch.tensor([len(payload)])
        first = _padded(size.numpy().tobytes() + payload[: _MESSAGE - 8], _MESSAGE)
        with self.hearing(f"a message of rank {source}"):
            dist.broadcast(first, source, group=self._control)
            length = int(first[:8].view(torch.int64))
            rest = _padded(payload[_MESSAGE - 8 :], max(0, length - _MESSAGE + 8))
            if len(rest):
                dist.broadcast(rest, source, group=self._control)
        return first[8 : 8 + length].numpy().tobytes() + rest.numpy().tobytes()


def raise_difference(found: Mapping[int, Mapping[str, Any]], where: str) -> None:
    """Raise RankError if the values of the ranks differ; it says which rank has what, for the first three."""
    told: list[str] = []
    keys = dict.fromkeys(key for values in found.values() for key in values)
    for key in keys:
        holders: dict[str, list[int]] = {}
        for rank, values in found.items():
            holders.setdefault(json.dumps(values.get(key)), []).append(rank)
        if len(holders) > 1 and not (told and key == _ALL):
            each = [f"{_short(value)} on rank{'s' * (len(on) > 1)} {_few(on)}" for value, on in holders.items()]
            told.append(f"{key}: {', '.join(each[:4])}")
    if told:
        more = f"; and {len(told) - 3} more" if len(told) > 3 else ""
        raise RankError(f"the ranks differ {where}: {'; '.join(told[:3])}{more}. Give all ranks the same")


def run_facts(loader: MixLoader, **of_the_mixer: Any) -> dict[str, Any]:
    """What all ranks of a run must have alike, JSON-able; what JSON does not know is told by its type."""
    of_the_loader = {
        "batch_size": loader.batch_size, "grad_accumulation_steps": loader.grad_accumulation_steps,
        "max_steps": loader.max_steps, "vocab_size": loader.vocab_size, "eot": loader.eot,
    }  # fmt: skip
    facts = {**of_the_loader, **of_the_mixer, **plan_facts(loader.state_dict()), "mixloader": version("mixloader")}
    return json.loads(json.dumps(facts, default=lambda value: type(value).__name__))


def plan_facts(stream: Mapping[str, Any]) -> dict[str, Any]:
    """A loader's state as values that say what they are, for raise_difference."""
    names = stream["domains"]
    facts = {key: value for key, value in stream.items() if not isinstance(value, list)}
    facts["fingerprint of the data"] = facts.pop("fingerprint")
    facts["domains"] = names
    step, _, units = stream["weights"][-1]
    facts["step of the last change of weights"] = step
    facts |= {f"weight of {name!r} from then on": unit / WEIGHT_ONE for name, unit in zip(names, units, strict=False)}
    for key in ("cursors", "residuals", "tokens_before"):
        facts |= {f"{key} of {name!r}": value for name, value in zip(names, stream[key], strict=False)}
    facts[_ALL] = _digest(stream)
    return facts


def _short(value: str) -> str:
    return value if len(value) <= 80 else f"{value[:77]}..."


def _few(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def _digest(value: Any) -> int:
    return zlib.crc32(_encode(value)) & ((1 << _DIGEST_BITS) - 1)


def _encode(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _decode(text: torch.Tensor | bytes) -> Any:
    return json.loads(text if isinstance(text, bytes) else text.numpy().tobytes())


def _padded(payload: bytes, size: int) -> torch.Tensor:
    """uint8 [size]: at most so many bytes of the payload, then zeros."""
    padded = torch.zeros(size, dtype=torch.uint8)
    if payload and size:
        padded[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    return padded


def _timeout(group: dist.ProcessGroup | None) -> timedelta | None:
    """That of the group, where this torch tells it; its groups do not hand it on by themselves."""
    for device in ("cpu", "cuda"):
        try:
            assert group is not None
            return group._get_backend(torch.device(device)).options._timeout
        except (RuntimeError, AttributeError):
            continue
    return None
