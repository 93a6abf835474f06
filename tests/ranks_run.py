"""What the processes of a distributed test run: several checks in one world, as starting one is what costs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import ranks_models
import torch
import torch.distributed as dist
from mixing import RandomWalk, Told, count, train
from ranks_models import error_of

from mixloader import MixLoader
from mixloader.mixer import Mixer

T, ROWS = 8, 8
STEPS = 14
HERE = Path(__file__).parent


def run(check: str, ranks: int, folder: Path, wait: Sequence[int] | None = None, **options: Any) -> list[Any]:
    """What `check`, of this file or ranks_models.py, returned on each of `ranks` processes.

    wait: for which of them; by default all.
    """
    folder.mkdir(exist_ok=True)
    path = os.pathsep.join([str(HERE), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    program = [sys.executable, str(HERE / "ranks_run.py"), check, str(folder), str(ranks), json.dumps(options)]
    wait = range(ranks) if wait is None else wait
    with ExitStack() as stack:
        started = []
        for rank in range(ranks):
            errors = stack.enter_context(open(folder / f"{rank}.err", "w"))
            started.append(stack.enter_context(subprocess.Popen([*program, str(rank)], env=environment, stderr=errors)))
            stack.callback(started[-1].kill)
        for rank in wait:
            assert started[rank].wait(timeout=120) == 0, (folder / f"{rank}.err").read_text()[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in wait]


# One run, on any number of ranks


def open_loader(data: Any, ranks: int, accumulation: int = 1, **options: Any) -> MixLoader:
    rows = ROWS // (ranks * accumulation)
    return MixLoader(data, rows, T, grad_accumulation_steps=accumulation, **{"seed": 3, "num_workers": 0, **options})


def report(mixer: Mixer, step: int, rank: int, ranks: int) -> None:
    """Feedback after plan step `step`: of one rank only, then of all, whose mean is the same on any number of them."""
    if step == 3 and rank == ranks - 1:
        mixer.feedback({"target": 1.5})
    if step == 8:
        mixer.feedback({"source": 2.0 + rank - (ranks - 1) / 2, "web": 0.75})


def draw(loader: MixLoader, mixer: Mixer, until: int, rank: int, ranks: int) -> list[tuple[int, int, Any, Any]]:
    """[step, micro-step, input_ids, domain_ids] of this rank's batches."""
    batches = []
    for step in range(loader.step, until):
        batches += train(loader, mixer, step + 1)
        report(mixer, step, rank, ranks)
    return [(b["step"], b["micro_step"], b["input_ids"].tolist(), b["domain_ids"].tolist()) for b in batches]


def whole(data: str, folder: Path, rank: int, ranks: int, accumulation: int = 1, every: int = 1) -> dict[str, Any]:
    """A run with a live policy; the state after seven steps, and what all ranks were told."""
    path = folder / f"record-{accumulation}-{every}.jsonl"
    mixers = {"decide_every": every, "record": path, "lag": every}
    with open_loader(data, ranks, accumulation) as loader, Mixer(loader, RandomWalk(0.01), **mixers) as mixer:
        batches = draw(loader, mixer, 7, rank, ranks)
        state = {"loader": loader.state_dict(), "mixer": mixer.state_dict()}
        batches += draw(loader, mixer, STEPS, rank, ranks)
        weights = loader.state_dict()["weights"]
        leads, has_policy = mixer.ranks.leads, mixer.policy is not None
    return {
        "batches": batches, "state": state, "weights": weights, "leads": leads, "has_policy": has_policy,
        "record": str(path),
    }  # fmt: skip


def rest(data: str, folder: Path, rank: int, ranks: int, state: dict[str, Any], every: int = 1) -> list[Any]:
    """The batches of the run that goes on from a state which another number of ranks has saved."""
    with open_loader(data, ranks) as loader, Mixer(loader, RandomWalk(), decide_every=every, lag=every) as mixer:
        loader.load_state_dict(state["loader"])
        mixer.load_state_dict(state["mixer"])
        return draw(loader, mixer, STEPS, rank, ranks)


def scripted(data: str, rank: int, ranks: int) -> list[Any]:
    """Batches of one domain after the other."""
    with (
        open_loader(data, ranks) as loader,
        Mixer(loader, Told(lambda o: [o.step % 3 == d for d in range(3)])) as mixer,
    ):
        return draw(loader, mixer, 6, rank, ranks)


def changed(data: str, rank: int, ranks: int) -> dict[str, Any]:
    """Steps are skipped, a domain comes and another goes."""
    with open_loader(data, ranks) as loader, Mixer(loader, RandomWalk(0.01)) as mixer:
        batches = draw(loader, mixer, 3, rank, ranks)
        mixer.skip(2)
        batches += draw(loader, mixer, 8, rank, ranks)
        mixer.add_domain("more", Path(data).parent / "code", 0.25)
        batches += draw(loader, mixer, 11, rank, ranks)
        mixer.remove_domain("web")
        batches += draw(loader, mixer, STEPS, rank, ranks)
        return {"batches": batches, "weights": loader.state_dict()["weights"]}


def objective(data: str, rank: int, ranks: int) -> list[Any]:
    loader = open_loader(data, ranks, weights=[0.5, 0.3, 0.2])
    with loader, Mixer(loader, RandomWalk(0.01), act="objective") as mixer:
        factors = []
        for _ in range(6):
            batch = next(loader)
            factors.append(mixer.domain_weights.tolist())
            count(mixer, batch)
            mixer.step()
    return factors


# The worlds


def four(folder: Path, rank: int, ranks: int, data: str, state: dict[str, Any]) -> dict[str, Any]:
    return {
        "rest": rest(data, folder, rank, ranks, state),
        "whole": whole(data, folder, rank, ranks),
        "seldom": whole(data, folder, rank, ranks, every=3),
        "scripted": scripted(data, rank, ranks),
        "objective": objective(data, rank, ranks),
        "mesh": mesh(data, folder, rank),
    }


def two(folder: Path, rank: int, ranks: int, data: str, states: dict[str, Any]) -> dict[str, Any]:
    return {
        "whole": whole(data, folder, rank, ranks, accumulation=2),
        "rest": rest(data, folder, rank, ranks, states["whole"]),
        "rest of seldom": rest(data, folder, rank, ranks, states["seldom"], every=3),
        "changed": changed(data, rank, ranks),
        "errors": errors(data, folder, rank),
        "saved": saved(data, folder, rank),
    }


def mesh(data: str, folder: Path, rank: int) -> dict[str, Any]:
    """Two data-parallel ranks of two processes each, which read and count the same."""
    from torch.distributed.device_mesh import init_device_mesh

    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    loader = MixLoader(data, 4, T, seed=3, num_workers=0, mesh=grid)
    with loader, Mixer(loader, RandomWalk(0.01), record=folder / "mesh.jsonl") as mixer:
        batches = draw(loader, mixer, 7, rank, 4)
        return {"batches": batches, "rank": loader.rank, "leads": mixer.ranks.leads, "record": str(mixer._log._path)}


def errors(data: str, folder: Path, rank: int) -> dict[str, str]:
    """What each rank says of ranks that differ, of a policy that fails, and of bad tokens."""
    found: dict[str, Any] = {}
    for name, loader_options, options in (
        ("seed", {"seed": 3 + rank}, {}),
        ("weights", {"weights": [1, 1 + rank, 1]}, {}),
        ("batch size", {"accumulation": 1 + rank}, {}),
        ("lag", {}, {"lag": 1 + rank}),
        ("data", {"data": {domain: Path(data).parent / domain for domain in ("web", "code", "math")[: 2 + rank]}}, {}),
        ("option", {}, {"decide_every": 1 - rank}),
        ("policy", {}, {"policy": ("natural", "uniform")[rank]}),
        ("unknown", {}, {"policy": "magic"}),
    ):
        with open_loader(**{"data": data, "ranks": 2, **loader_options}) as loader:
            found[name] = error_of(
                lambda loader=loader, options=options: Mixer(loader, **{"policy": "natural", **options})
            )

    def by_hand() -> None:
        with open_loader(data, 2) as loader, Mixer(loader, "natural") as mixer:
            train(loader, mixer, 2)
            if rank == 1:
                loader.set_weights([1, 2, 3])
            train(loader, mixer, 5)

    def raising(observation: Any) -> Any:
        if observation.step == 2:
            raise RuntimeError("no idea")
        return [observation.step % 3 == d for d in range(3)]

    def failing() -> list[int]:
        import warnings

        with warnings.catch_warnings(record=True) as caught, open_loader(data, 2) as loader:
            warnings.simplefilter("always")
            with Mixer(loader, Told(raising)) as mixer:
                batches = train(loader, mixer, 6)
        found["warnings"] = [str(w.message) for w in caught if "policy" in str(w.message)]
        return [sorted(set(batch["domain_ids"].tolist())) for batch in batches]

    def bad_tokens() -> None:
        with open_loader(data, 2) as loader, Mixer(loader, "natural") as mixer:
            train(loader, mixer, 2)
            some = torch.ones(1, dtype=torch.bool)
            if rank == 1:
                mixer.stats.add(torch.tensor([math.nan]), torch.tensor([1]), some, ~some)
            train(loader, mixer, 5)

    def other_state() -> None:
        with open_loader(data, 2) as loader, Mixer(loader, RandomWalk()) as mixer:
            train(loader, mixer, 3)
            state = mixer.state_dict()
            if rank == 1:
                state["sums"][0][0] += 1
            mixer.load_state_dict(state)

    found["by hand"] = error_of(by_hand)
    found["failing"] = failing()
    found["bad tokens"] = error_of(bad_tokens)
    found["state"] = error_of(other_state)
    found["reset"] = error_of(lambda: Mixer(open_loader(data, 2), Told(lambda o: None, first=[1.0])))
    return found


def saved(data: str, folder: Path, rank: int) -> dict[str, Any]:
    """torch.distributed.checkpoint takes loader and mixer as one, beside tensors, and a new run goes on from it."""
    import torch.distributed.checkpoint as dcp

    from mixloader.saved import SavedRun

    options = {"decide_every": 3, "lag": 2, "record": folder / "saved.jsonl"}
    with open_loader(data, 2) as loader, Mixer(loader, RandomWalk(), **options) as mixer:
        draw(loader, mixer, 7, rank, 2)
        tensor = torch.full((3,), 7.0)
        dcp.save({"tensor": tensor, "run": SavedRun(loader, mixer)}, checkpoint_id=folder / "saved")
        expected = draw(loader, mixer, STEPS, rank, 2)
    with open_loader(data, 2) as loader, Mixer(loader, RandomWalk(), **options) as mixer:
        tensor = torch.zeros(3)
        state = {"tensor": tensor, "run": SavedRun(loader, mixer)}
        dcp.load(state, checkpoint_id=folder / "saved")
        resumed = draw(loader, mixer, STEPS, rank, 2)
    return {"expected": expected, "resumed": resumed, "tensor": tensor.tolist()}


def resumed_alone(data: str, folder: Path) -> list[Any]:
    """The batches of one process that goes on from what `saved` has saved."""
    import torch.distributed.checkpoint as dcp

    from mixloader.saved import SavedRun

    with open_loader(data, 1) as loader, Mixer(loader, RandomWalk(), decide_every=3, lag=2) as mixer:
        dcp.load({"run": SavedRun(loader, mixer)}, checkpoint_id=folder / "saved")
        return draw(loader, mixer, STEPS, 0, 1)


def dies(folder: Path, rank: int, ranks: int, data: str) -> dict[str, Any]:
    """Rank 1 is gone after three steps; what the other one is told, and that it comes to an end."""

    def lonely() -> None:
        with open_loader(data, ranks) as loader, Mixer(loader, RandomWalk()) as mixer:
            train(loader, mixer, 3)
            if rank == 1:
                os._exit(0)
            begin.append(time.monotonic())
            train(loader, mixer, 8)

    begin: list[float] = []
    said = error_of(lonely)
    return {"said": said, "seconds": time.monotonic() - begin[0]}


def main(check: str, folder: str, ranks: str, options: str, rank: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store-{check}", int(ranks))
    timeout = timedelta(seconds=30)
    dist.init_process_group("gloo", store=store, rank=int(rank), world_size=int(ranks), timeout=timeout)
    call = globals().get(check) or getattr(ranks_models, check)
    result = call(Path(folder), int(rank), int(ranks), **json.loads(options))
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    if check != "dies":
        dist.barrier()
    sys.stderr.flush()
    # gloo's threads now and then abort a process whose interpreter goes down around them.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
