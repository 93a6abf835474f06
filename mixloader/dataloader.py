"""What torch's DataLoader and its users expect of a loader: argument rules, and a dataset for code that insists."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch.utils.data import IterableDataset, get_worker_info

from mixloader.errors import MixLoaderError

# torch's DataLoader has these; a loader that took them silently would not do what they say.
_REFUSED = {
    "dataset": "data= is a manifest, a folder or {name: path}",
    "sampler": "the plan decides which window comes next; change the mixture with set_weights()",
    "batch_sampler": "the plan decides which window comes next; change the mixture with set_weights()",
    "collate_fn": "batches are filled in place; transform them after they are drawn",
    "worker_init_fn": "workers are threads of the C++ core, not processes",
    "multiprocessing_context": "workers are threads of the C++ core, not processes",
}
# These hold as they are: batches are full and in order, the state is cheap at every step, threads live as long as the
# loader, and pinned memory serves every device.
_FIXED = frozenset({"batch_size", "seq_len", "world_size", "rank", "seed", "global_batch", "layout", "rules", "format"})
_HELD = ("drop_last", "snapshot_every_n_steps", "persistent_workers", "pin_memory_device")


def check_torch_arguments(arguments: Mapping[str, Any], num_workers: int | None, prefetch_factor: int | None) -> None:
    """Apply torch's rules to arguments that only torch's DataLoader has a use for.

    Raises TypeError for what cannot be honoured or is no argument, ValueError as torch does.
    """
    for name, value in arguments.items():
        if name == "in_order":
            if value is not True:
                raise TypeError("MixLoader cannot honour in_order=False: the order of batches is part of the stream")
        elif name not in _HELD:
            reason = _REFUSED.get(name, "it is no argument of MixLoader")
            raise TypeError(f"MixLoader cannot honour {name}=: {reason}")
    if num_workers == 0 and prefetch_factor is not None:
        raise ValueError("prefetch_factor is given, but num_workers=0 reads nothing ahead; give at least one worker")
    if num_workers == 0 and arguments.get("persistent_workers"):
        raise ValueError("persistent_workers is given, but num_workers=0 has none; give at least one worker")


class DataLoaderSurface:
    """The attributes and methods of torch's DataLoader that trainers read, for MixLoader."""

    drop_last = True
    sampler = None
    batch_sampler = None

    def as_dataset(self) -> LoaderDataset:
        """For code that insists on torch's DataLoader: DataLoader(loader.as_dataset(), batch_size=None)."""
        return LoaderDataset(self)

    @property
    def dataset(self) -> LoaderDataset:
        return self.as_dataset()

    def set_epoch(self, epoch: int) -> None:
        """Nothing: each domain counts its own epochs, and permutes its windows anew in each."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIXED and name in self.__dict__:
            raise ValueError(f"{name} cannot be set after the loader was made; make a new one and load its state")
        super().__setattr__(name, value)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a loader holds threads and cannot be pickled or copied; make another one and load_state_dict() into it"
        )


class LoaderDataset(IterableDataset):
    """A MixLoader as a torch dataset whose items are whole batches, for torch's DataLoader(batch_size=None).

    It reads ahead in threads of its own, so num_workers must be 0; its state is the loader's.
    """

    def __init__(self, loader: Any):
        self.loader = loader

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if get_worker_info() is not None:
            raise MixLoaderError(
                "a MixLoader cannot run in DataLoader workers, each of which would draw the whole stream again; use "
                "DataLoader(loader.as_dataset(), batch_size=None, num_workers=0), which reads ahead in threads"
            )
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)

    def state_dict(self) -> dict[str, Any]:
        return self.loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.loader.load_state_dict(state)


def seed_of(seed: int | None, generator: torch.Generator | None) -> int:
    """The seed given, or that of a torch generator, or 0."""
    if seed is not None and generator is not None:
        raise ValueError("give either seed= or generator=, not both")
    return generator.initial_seed() if generator is not None else seed or 0
