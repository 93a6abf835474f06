"""The reference trainer on the processes that torchrun starts: DDP, with one run's folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mixloader.ranks import Ranks


@contextmanager
def joined(device: str) -> Iterator[tuple[Ranks, str]]:
    """The processes of a run, and the device of this one; alone where torchrun did not start several.

    device: as in the config; on GPUs each process of a machine takes the one of its LOCAL_RANK. A process group that is
    there already is used as it is.
    """
    begun = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if begun:
        if device in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(torch.device(device))
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    ranks = Ranks(range(dist.get_world_size())) if dist.is_initialized() else Ranks()
    try:
        yield ranks, device
    finally:
        ranks.close()
        if begun:
            dist.destroy_process_group()


def data_parallel(model: nn.Module, device: torch.device, ranks: Ranks) -> nn.Module:
    """`model` under DDP, if there are several ranks."""
    if ranks.alone:
        return model
    return DistributedDataParallel(model, [device] if device.type == "cuda" else None)


def without_sync(model: nn.Module) -> AbstractContextManager[None]:
    """In it, gradients are added up on this rank only: all micro-batches of a step but the last."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def mean_over(ranks: Ranks, value: Tensor) -> float:
    """The mean over ranks of a scalar on the device; all ranks call it."""
    if ranks.alone:
        return float(value)
    value = value.clone()
    dist.all_reduce(value)
    return float(value) / len(ranks.members)
