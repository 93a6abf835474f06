"""How the rows of an optimizer step are dealt to ranks and micro-batches."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

DATA_DIMS = ("dp", "ddp", "fsdp", "hsdp", "data", "batch", "replicate", "shard", "dp_replicate", "dp_shard")
"""Names of mesh dimensions along which ranks read different rows; along all others they read the same."""


@dataclass(frozen=True)
class Layout:
    """Row r of micro-batch m on rank k is row (m * world_size + k) * batch_size + r of the step."""

    batch_size: int
    micro_batches: int
    world_size: int
    rank: int

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.micro_batches * self.world_size

    @classmethod
    def resolve(
        cls,
        batch_size: int,
        micro_batches: int | None,
        global_batch: int | None,
        world_size: int | None,
        rank: int | None,
        mesh: DeviceMesh | None,
        mesh_dims: Sequence[str] | None,
    ) -> Layout:
        """The layout that these arguments of a MixLoader mean; raises ValueError if they contradict each other."""
        world_size, rank = _ranks(world_size, rank, mesh, mesh_dims)
        check_counts(batch_size=(batch_size, 1), world_size=(world_size, 1), rank=(rank, 0))
        if rank >= world_size:
            raise ValueError(f"rank is {rank}, but world_size is {world_size}; ranks count from 0")
        rows = world_size * batch_size
        if global_batch is None:
            micro_batches = 1 if micro_batches is None else micro_batches
            check_counts(grad_accumulation_steps=(micro_batches, 1))
        else:
            check_counts(global_batch=(global_batch, 1))
            if global_batch % rows or micro_batches not in (None, global_batch // rows):
                steps = "" if micro_batches is None else f" and {micro_batches} accumulation steps"
                raise ValueError(
                    f"a global batch of {global_batch} rows cannot be dealt to {world_size} ranks in micro-batches of "
                    f"{batch_size} rows{steps}; give a multiple of {rows}"
                )
            micro_batches = global_batch // rows
        return cls(int(batch_size), int(micro_batches), int(world_size), int(rank))


def check_counts(**counts: tuple[int, int]) -> None:
    """Raise ValueError unless each (value, least) is an integer of at least `least` that fits 64 bits."""
    for name, (value, least) in counts.items():
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or not least <= value < 1 << 64:
            raise ValueError(f"{name} is {value!r}; expected an integer of at least {least}, in 64 bits")


def _ranks(
    world_size: int | None, rank: int | None, mesh: DeviceMesh | None, mesh_dims: Sequence[str] | None
) -> tuple[int, int]:
    """(world_size, rank) as given, or of the data dimensions of a mesh, or of torch.distributed, or (1, 0)."""
    if mesh is not None:
        if world_size is not None or rank is not None:
            raise ValueError("give either mesh= or world_size= and rank=, not both")
        return mesh_ranks(mesh, mesh_dims)
    if mesh_dims is not None:
        raise ValueError("mesh_dims= says which dimensions of mesh= are data-parallel, but there is no mesh=")
    available = torch.distributed.is_available()
    distributed = available and torch.distributed.is_initialized()
    by_torchrun = available and torch.distributed.is_torchelastic_launched()
    started = int(os.environ.get("WORLD_SIZE", "1")) if by_torchrun else 1
    if world_size is None and not distributed and started > 1:
        raise ValueError(
            f"torchrun has started {started} processes, but torch.distributed is not initialized, so each would read "
            "all rows; call init_process_group() before making the loader, or give world_size= and rank="
        )
    if world_size is None:
        world_size = torch.distributed.get_world_size() if distributed else 1
    if rank is None and world_size > 1 and not distributed:
        raise ValueError(f"world_size is {world_size}, but there is no rank=; give each process its own, from 0")
    if rank is None:
        rank = torch.distributed.get_rank() if distributed else 0
    return world_size, rank


def mesh_ranks(mesh: DeviceMesh, dims: Sequence[str] | None = None) -> tuple[int, int]:
    """(world_size, rank) over the dimensions `dims` of a mesh; ranks that differ only elsewhere share a rank.

    So tensor-, context- and pipeline-parallel ranks get the same rows. dims: names, outermost first; by
    default those in DATA_DIMS. Raises ValueError for a mesh without names, or without such a dimension.
    """
    names, chosen = _data_dims(mesh, dims)
    world_size, rank = 1, 0
    for name in chosen:
        size = mesh.size(names.index(name))
        world_size, rank = world_size * size, rank * size + mesh.get_local_rank(name)
    return world_size, rank


def mesh_members(mesh: DeviceMesh, dims: Sequence[str] | None = None) -> tuple[list[int], list[int]]:
    """Global ranks of this process's data-parallel group, by their rank in mesh_ranks, and of the whole mesh.

    The first of the latter has rank 0 in all dimensions.
    """
    names, chosen = _data_dims(mesh, dims)
    order = [names.index(name) for name in (*(n for n in names if n not in chosen), *chosen)]
    groups = mesh.mesh.permute(order).reshape(-1, mesh_ranks(mesh, dims)[0]).tolist()
    (mine,) = (group for group in groups if torch.distributed.get_rank() in group)
    return mine, [rank for group in groups for rank in group]


def _data_dims(mesh: DeviceMesh, dims: Sequence[str] | None) -> tuple[tuple[str, ...], list[str]]:
    """The names of all dimensions, and of the data-parallel ones, outermost first."""
    names = mesh.mesh_dim_names
    if names is None:
        raise ValueError("the dimensions of the mesh have no names; make it with mesh_dim_names=")
    if isinstance(dims, str) or (dims is not None and len(set(dims)) != len(dims)):
        raise ValueError(f"mesh_dims is {dims!r}; expected a list of different names")
    chosen = [name for name in names if name in DATA_DIMS] if dims is None else list(dims)
    unknown = [name for name in chosen if name not in names]
    if unknown or (dims is None and not chosen):
        found = f"no dimension {unknown[0]!r}" if unknown else "no dimension that is known to be data-parallel"
        raise ValueError(f"the mesh has {found}; its dimensions are {', '.join(names)}: name them in mesh_dims=")
    return names, chosen
