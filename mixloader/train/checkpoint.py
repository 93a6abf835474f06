"""Checkpoints: a folder `step-000123` that is either whole or absent, whenever the process dies.

It holds model.safetensors (parameters by name, tied ones once), optimizer.safetensors (the step and moments of
every parameter, exact), influence.safetensors where influence is measured, and state.json (everything else: step,
config, loader, mixer, random generators). It is written under another name, synced to disk and renamed.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mixloader.config import ModelConfig
from mixloader.errors import MixLoaderError, StateError
from mixloader.files import sync
from mixloader.influence import Influence
from mixloader.train.hf_checkpoint import is_hf_folder, load_hf_model, load_hf_parameters
from mixloader.train.model import LanguageModel, build_model

VERSION = 1
_NAME = re.compile(r"step-(\d{6,})")


def save_checkpoint(
    out: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    influence: Influence | None = None,
) -> Path:
    """Write `out/step-<step>`, which must not exist yet, and return it.

    state: JSON-able; the version and the random generators are added to it here. Raises MixLoaderError, and leaves
    nothing behind, if it cannot be written.
    """
    from safetensors import SafetensorError

    temporary, final = out / f".step-{step:06d}.tmp", out / f"step-{step:06d}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        state = {"version": VERSION, "step": step, **state, "rng": rng_state()}
        _write(temporary, model, optimizer, state, None if influence is None else influence.state_dict())
        temporary.rename(final)
        sync(out)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise MixLoaderError(
            f"cannot write checkpoint {final}: {error}; those before it are whole: mend this, then run the same command"
        ) from error
    return final


def _write(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    influence: dict[str, Tensor] | None,
) -> None:
    from safetensors.torch import save_file

    # named_parameters gives a tied matrix once.
    parameters = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    save_file(parameters, folder / "model.safetensors")
    save_file(_optimizer_tensors(model, optimizer), folder / "optimizer.safetensors")
    if influence is not None:
        save_file(influence, folder / "influence.safetensors")
    (folder / "state.json").write_text(json.dumps(state, allow_nan=False) + "\n", encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        sync(path)


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, influence: Influence | None = None
) -> dict[str, Any]:
    """Put a checkpoint into `model`, `optimizer`, `influence` and torch's generators, and return its state.

    Where ranks have generators of their own, these are in the state as "rngs", by rank.
    """
    state = read_state(path)
    if influence is not None:
        influence.load_state_dict(read_tensors(path / "influence.safetensors"))
    load_parameters(path / "model.safetensors", model)
    _load_optimizer(path / "optimizer.safetensors", model, optimizer)
    several = dist.is_available() and dist.is_initialized()
    set_rng_state(state["rngs"][str(dist.get_rank())] if several else state["rng"])
    return state


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint; raises StateError if it is missing, damaged or of a later version."""
    file = path / "state.json"
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StateError(f"cannot read {file}: {error}; remove {path} to go on from the one before") from error
    if state.get("version") != VERSION:
        raise StateError(
            f"{file} has version {state.get('version')!r}; this mixloader reads version {VERSION}; "
            "use the mixloader that wrote it"
        )
    return state


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints in a run's folder, oldest first; what a killed writer left is not one."""
    found = [(int(match[1]), path) for path in out.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def latest_checkpoint(out: Path) -> Path | None:
    """The checkpoint of the highest step in a run's folder, or None."""
    found = checkpoints(out)
    return found[-1] if found else None


def remove_old(out: Path, keep: int) -> None:
    """Remove all but the `keep` latest checkpoints, and what killed writers left."""
    for path in checkpoints(out)[:-keep]:
        # Renamed first: a folder half removed would pass for a checkpoint.
        path.rename(out / f".{path.name}.tmp")
    for path in out.glob(".step-*.tmp"):
        shutil.rmtree(path)


def run_checkpoint(path: Path) -> Path:
    """`path` if it is a checkpoint, else the latest one of the run there; raises StateError if there is none."""
    folder = path if (path / "state.json").exists() else latest_checkpoint(path)
    if folder is None:
        raise StateError(f"{path} holds no checkpoint; expected a run's folder, or a folder step-000123 of one")
    return folder


def load_model(path: Path) -> LanguageModel:
    """The model of a checkpoint, of a run's latest one or of a folder of transformers, on the CPU.

    torch's generators stay as they are. Raises StateError if there is none.
    """
    if is_hf_folder(path):
        return load_hf_model(path)
    folder = run_checkpoint(path)
    config = read_state(folder)["config"]["model"]
    with torch.random.fork_rng(devices=[]):
        model = build_model(ModelConfig(**config))
    load_parameters(folder, model)
    return model


def load_parameters(path: Path, model: nn.Module) -> None:
    """Copy parameters into `model`: from a .safetensors file, a checkpoint, a run's latest one, or a folder of
    transformers (for a LanguageModel).

    Raises StateError, and changes nothing, if a parameter is missing, left over or of another shape.
    """
    if is_hf_folder(path):
        load_hf_parameters(path, model)
        return
    if path.is_dir():
        folder = path if (path / "model.safetensors").exists() else latest_checkpoint(path)
        if folder is None:
            raise StateError(f"{path} holds no checkpoint; expected model.safetensors or folders step-000123 in it")
        path = folder / "model.safetensors"
    tensors = read_tensors(path)
    parameters = dict(model.named_parameters())
    _check_names(path, set(tensors), set(parameters))
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise StateError(
                f"{path} holds {name} of shape {list(tensors[name].shape)}; the model has {list(parameter.shape)}; "
                "build the model with the sizes that the parameters were trained with"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value.contiguous()
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def _load_optimizer(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    tensors = read_tensors(path)
    names = {parameter: name for name, parameter in model.named_parameters()}
    _check_names(path, {key.split("/")[0] for key in tensors} or set(names.values()), set(names.values()))
    ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    # An optimizer that has taken no step has no state.
    state: dict[int, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        name, key = full.split("/")
        state.setdefault(ordered.index(name), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file; raises StateError if it cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise StateError(f"cannot read {path}: {error}; expected a .safetensors file of its tensors") from error


def _check_names(path: Path, found: set[str], expected: set[str]) -> None:
    for name in sorted(found ^ expected):
        what = "has no" if name in expected else "holds an unknown"
        raise StateError(f"{path} {what} parameter {name}; expected the parameters of a model of the same config")


def rng_state() -> dict[str, str]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return {device: base64.b64encode(state.numpy().tobytes()).decode() for device, state in states.items()}


def set_rng_state(saved: dict[str, str]) -> None:
    states = {
        device: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8) for device, text in saved.items()
    }
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
