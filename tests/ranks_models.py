"""What the processes of a distributed test train: tiny models under DDP and FSDP2, and the reference trainer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_run import MODEL, VOCAB_SIZE, Chase, tiny_config
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mixloader import MixLoader
from mixloader.config import ModelConfig
from mixloader.influence import Influence
from mixloader.loss import domain_cross_entropy
from mixloader.mixer import Mixer
from mixloader.train import trainer
from mixloader.train.model import build_model

ROWS, T = 12, 16
SIZES = ModelConfig(**{**vars(MODEL), "dropout": 0.0, "n_layer": 2, "vocab_size": VOCAB_SIZE, "seq_len": T})
TABLE = ("value", "std", "gram", "row_norm_sq", "rows", "step")


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for block in model.h:
        fully_shard(block)
    return fully_shard(model)


WRAPPERS = {"alone": lambda model: model, "ddp": DistributedDataParallel, "fsdp": sharded}


def train_model(
    kind: str, data: str, ranks: int, *, steps: int = 5, before: bool = False, accumulation: int = 1, **options: Any
) -> dict[str, Any]:
    """Some steps of SGD on a model that is wrapped before or after Influence hooks into it."""
    torch.manual_seed(0)
    model: nn.Module = build_model(SIZES)
    wrapped = WRAPPERS[kind](model) if not before else model
    sketches = Influence(wrapped, rank=8, stride=1, probe_every=2, probe_rows=3, half_life=20.0)
    if before:
        wrapped = WRAPPERS[kind](model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.3)
    loader = MixLoader(data, ROWS // ranks // accumulation, T, grad_accumulation_steps=accumulation, seed=1)
    found: dict[str, Any] = {"tables": [], "weights": [], "losses": [], "factors": []}
    with loader, Mixer(loader, influence=sketches, **{"policy": "natural", **options}) as mixer:
        for _ in range(steps):
            for left in reversed(range(accumulation)):
                batch = next(loader)
                factors = mixer.domain_weights
                found["factors"].append(None if factors is None else factors.tolist())
                with wrapped.no_sync() if left and kind == "ddp" else nullcontext():
                    logits = wrapped(batch["input_ids"])
                    loss = domain_cross_entropy(
                        logits, batch["targets"], batch["domain_ids"], stats=mixer.stats, domain_weights=factors
                    )
                    (loss / accumulation).backward()
            optimizer.step()
            optimizer.zero_grad()
            mixer.step()
            table = sketches.snapshot().wait()
            found["tables"].append({key: getattr(table, key).tolist() for key in TABLE})
            found["weights"].append(loader.weights.tolist())
        state = mixer.state_dict()
        found["losses"] = state["decider"]["signals"]["loss"]
    parameters = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in wrapped.parameters()]
    found["total"] = sum(float(p.detach().double().abs().sum()) for p in parameters)
    return found


def live(kind: str, data: str, ranks: int) -> dict[str, Any]:
    return train_model(kind, data, ranks, steps=20, policy=Chase())


def objective(kind: str, data: str, ranks: int) -> dict[str, Any]:
    return train_model(kind, data, ranks, steps=8, accumulation=2, policy=Chase(), act="objective")


def train_and_resume(data: str, folder: Path) -> dict[str, Any]:
    """FSDP2 and torch.distributed.checkpoint: six steps at a stretch, and in two parts; what each ended with."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    from mixloader.saved import SavedRun

    def part(saves: bool, resumes: bool) -> dict[str, Any]:
        torch.manual_seed(int(resumes))  # other parameters, until those of the checkpoint are loaded
        model = sharded(build_model(SIZES))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        sketches = Influence(model, rank=4, stride=1, probe_every=2, probe_rows=3, half_life=20.0)
        loader = MixLoader(data, ROWS // 2, T, seed=1)
        batches = []
        with loader, Mixer(loader, "influence", influence=sketches) as mixer:

            def states() -> dict[str, Any]:
                parameters, moments = get_state_dict(model, optimizer)
                return {"model": parameters, "moments": moments, "run": SavedRun(loader, mixer)}

            if resumes:
                loaded = states()
                dcp.load(loaded, checkpoint_id=folder)
                set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["moments"])
            while loader.step < 6:
                if saves and loader.step == 3:
                    dcp.save(states(), checkpoint_id=folder)
                batch = next(loader)
                batches.append(batch["input_ids"].tolist())
                logits = model(batch["input_ids"])
                domain_cross_entropy(logits, batch["targets"], batch["domain_ids"], stats=mixer.stats).backward()
                optimizer.step()
                optimizer.zero_grad()
                mixer.step()
            weights = loader.units.tolist()
        parameters = [p.full_tensor().tolist() for p in model.parameters()]
        return {"batches": batches[-3:], "weights": weights, "parameters": parameters}

    return {"whole": part(True, False), "resumed": part(False, True)}


class Killed(Exception):
    pass


def train_run(data: str, out: Path, dies_at: int | None = None, seed: int = 0) -> dict[str, Any] | None:
    """The reference trainer, which dies in the middle of a plan step on all ranks; then None."""
    changes = {"grad_accumulation_steps": 2, "batch_size": 2, "feedback": True, "seed": seed}
    config = tiny_config(Path(data), out, **changes, influence={"rank": 4, "stride": 2, "probe_every": 3})
    step = trainer.Trainer._train_step

    def die(self: trainer.Trainer, batches: Any) -> Any:
        if self.step == dies_at:
            next(batches)
            raise Killed
        return step(self, batches)

    trainer.Trainer._train_step = die
    try:
        result = trainer.train(config, progress=False)
    except Killed:
        return None
    finally:
        trainer.Trainer._train_step = step
    values = dataclasses.asdict(result)
    return {**values, "record": str(result.record), "checkpoint": str(result.checkpoint)}


def models(folder: Path, rank: int, ranks: int, data: str) -> dict[str, Any]:
    kinds = [("ddp", False), ("ddp", True), ("fsdp", False), ("fsdp", True)]
    found = {f"{kind} {before}": train_model(kind, data, ranks, before=before) for kind, before in kinds}
    whole = train_run(data, folder / "whole")
    assert train_run(data, folder / "died", dies_at=8) is None
    dist.barrier()
    return {
        **found,
        "live": live("ddp", data, ranks),
        "objective": objective("ddp", data, ranks),
        "fsdp2": train_and_resume(data, folder / "fsdp2"),
        "whole": whole,
        "again": train_run(data, folder / "whole"),
        "resumed": train_run(data, folder / "died"),
        "other seed": error_of(lambda: train_run(data, folder / "whole", seed=7)),
    }
