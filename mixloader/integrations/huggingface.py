"""Hugging Face's Trainer on a MixLoader: its batches, losses by domain, decisions at optimizer steps, exact resume.

    loader = trainer_loader("data/manifest.json", 1024, args, model)
    mixer = Mixer(loader, policy="agent", device=args.device)
    MixTrainer(model, args, mixer=mixer, eval_dataset=held_out_sets(loader)).train()

docs/huggingface.md says what Trainer does with it, and how late a change of weights is. For TRL:
`class MixSFTTrainer(MixTrainer, SFTTrainer): pass`.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixloader.errors import ConfigError, StateError
from mixloader.files import replace
from mixloader.heldout import HeldOut
from mixloader.integrations.huggingface_head import fused_head
from mixloader.loader import MixLoader
from mixloader.loss import domain_cross_entropy
from mixloader.mixer import Mixer
from mixloader.train.checkpoint import read_tensors

try:
    import transformers
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise ConfigError(f"transformers' Trainer cannot be imported: {error}; pip install 'mixloader[hf]'") from error

TESTED = ((4, 57), (5, 23))
"""The oldest and the newest transformers that the tests were run with."""

STATE = "mixloader.json"
INFLUENCE = "mixloader-influence.safetensors"
"""What is written into each checkpoint folder beside what Trainer writes."""

_VERSION = 1


def trainer_loader(data: Any, seq_len: int, args: TrainingArguments, model: nn.Module, **options: Any) -> MixLoader:
    """A MixLoader with the batch, the accumulation, the ranks, the seed and the steps of `args`.

    data, seq_len, options: of MixLoader; options go before what `args` say. Raises ConfigError if the data have ids
    that `model` has no embedding for.
    """
    given: dict[str, Any] = {
        "grad_accumulation_steps": args.gradient_accumulation_steps,
        "seed": args.seed if args.data_seed is None else args.data_seed,
        "max_steps": args.max_steps if args.max_steps > 0 else None,
        "pin_memory": args.dataloader_pin_memory and args.device.type == "cuda",
        "vocab_size": _vocab_size(model),
    }
    if "mesh" not in options:
        given |= {"world_size": args.world_size, "rank": args.process_index}
    loader = MixLoader(data, args.per_device_train_batch_size, seq_len, **(given | options))
    try:
        _check_vocab(loader, model)
    except ConfigError:
        loader.close()
        raise
    return loader


def held_out_sets(loader: MixLoader, windows_per_domain: int = 64, batch_size: int | None = None) -> dict[str, HeldOut]:
    """The held-out windows of each domain by its name, for Trainer's `eval_dataset`. batch_size: the loader's."""
    return {
        name: loader.held_out(batch_size, domains=[name], windows_per_domain=windows_per_domain)
        for name in loader.held_out(windows_per_domain=windows_per_domain).names
    }


class MixTrainer(Trainer):
    """A Trainer that trains on the loader of a Mixer, and steps the Mixer after each optimizer step.

    mixer: made for `args.device` on a loader such as `trainer_loader` makes; with an Influence, made on the bare model
        before this. It stays the caller's to close. All other arguments are Trainer's; a train_dataset is not read.

    `args.ignore_data_skip` is set, as the loader resumes by itself, and `args.max_steps`, where it is not given, to the
    loader's. The losses that an evaluation found are told to the Mixer where `eval_dataset` is a dictionary with names
    of domains, "source" or "target"; such a set may be a HeldOut.

    Raises ConfigError if loader, model and `args` do not agree, or for what cannot be had (see docs/huggingface.md).
    """

    def __init__(self, *args: Any, mixer: Mixer, **options: Any):
        _check_version()
        super().__init__(*args, **options)
        model: Any = self.model
        _check(self, mixer, model)
        self.mixer = mixer
        self.args.ignore_data_skip = True
        if self.args.max_steps <= 0 and mixer.loader.max_steps is not None:
            self.args.max_steps = mixer.loader.max_steps
        self._steps = _Steps(mixer)
        self.add_callback(self._steps)
        # What torch.compile has traced does not change with the targets; DeepSpeed keeps weights in parts.
        self._head = None if self.args.torch_compile or self.is_deepspeed_enabled else fused_head(model)

    # Batches and losses

    def get_train_dataloader(self) -> Any:
        """The loader's batches as models take them. No DataLoader, which accelerate would make anew from its data."""
        return _Batches(self.mixer.loader)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As Trainer's; a HeldOut is read as it is, whole on every rank."""
        sets: Any = self.eval_dataset
        found = sets if eval_dataset is None else sets[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        return _Batches(found) if isinstance(found, HeldOut) else super().get_eval_dataloader(eval_dataset)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean over num_items_in_batch, the targets of all micro-batches and ranks, as Trainer's own losses are.

        Batches that are not the loader's (those of other eval_datasets) are left to Trainer.
        """
        if "domain_ids" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        training = torch.is_grad_enabled()
        options: dict[str, Any] = {"stats": self.mixer.stats}
        if training:
            options["label_smoothing"] = self.args.label_smoothing_factor
            options["domain_weights"] = self.mixer.domain_weights
        if num_items_in_batch is not None:
            # Gradients are averaged over the ranks, so each takes its part of the targets of all.
            ranks = self.mixer.loader.world_size if self.args.average_tokens_across_devices else 1
            options["denominator"] = num_items_in_batch / ranks
        targets, domain_ids = inputs["labels"], inputs["domain_ids"]
        taken = {"input_ids": inputs["input_ids"]}
        if "position_ids" in inputs:
            # Without a cache, models keep the documents apart whose positions begin anew.
            taken |= {"position_ids": inputs["position_ids"], "use_cache": False}
        if self._head is not None and not return_outputs:
            with self._head.returning(targets, domain_ids, options):
                return _logits(model(**taken))
        outputs = model(**taken)
        loss = domain_cross_entropy(_logits(outputs), targets, domain_ids, **options)
        return (loss, outputs) if return_outputs else loss

    # Evaluation and logs

    def evaluate(self, eval_dataset: Any = None, *args: Any, **options: Any) -> dict[str, float]:
        """As Trainer's. Losses by domain or field are told to the Mixer, and the means of fields that follow."""
        metrics = super().evaluate(eval_dataset, *args, **options)
        sets = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(sets, Mapping):
            prefix = args[1] if len(args) > 1 else options.get("metric_key_prefix", "eval")
            losses = {name: metrics[f"{prefix}_{name}_loss"] for name in sets if f"{prefix}_{name}_loss" in metrics}
            self._tell(losses)
        return metrics

    def _tell(self, losses: Mapping[str, float]) -> None:
        table = self.mixer.loader.table
        known = ("source", "target", *table.names)
        told = {name: loss for name, loss in losses.items() if name in known and math.isfinite(loss)}
        for field in ("source", "target"):
            names = [name for name, of in zip(table.names, table.fields, strict=True) if of == field]
            if field not in told and names and all(name in told for name in names):
                told[field] = sum(told[name] for name in names) / len(names)
        if told:
            self.mixer.feedback(told)

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """As Trainer's, with what was read since the last log of training, and the weights of the next step."""
        if "loss" in logs:
            logs = logs | self._steps.metrics()
        super().log(logs, *args, **options)

    # Checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **options: Any) -> Any:
        """As Trainer's. With True, from the last checkpoint that is whole: a killed run may leave half of one."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_checkpoint(str(self.args.output_dir)))
        if resume_from_checkpoint:
            self._load_mixer(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint or None, *args, **options)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._save_mixer(folder)  # before trainer_state.json, which Trainer writes last
        super()._save_checkpoint(model, trial)

    def _save_mixer(self, folder: Path) -> None:
        mixer, influence = self.mixer, self.mixer.influence
        state = {"version": _VERSION, "loader": mixer.loader.state_dict(), "mixer": mixer.state_dict()}
        tensors = None if influence is None else influence.state_dict()
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if tensors is not None:
            from safetensors.torch import save_file

            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / INFLUENCE)
        replace(folder / STATE, json.dumps(state, allow_nan=False) + "\n")

    def _load_mixer(self, folder: Path) -> None:
        try:
            state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StateError(
                f"cannot read {folder / STATE}: {error}; resume from a checkpoint that a MixTrainer saved"
            ) from error
        if not isinstance(state, dict) or state.get("version") != _VERSION:
            raise StateError(f"{folder / STATE} is not of version {_VERSION}; use the mixloader that wrote it")
        if self.mixer.influence is not None:
            self.mixer.influence.load_state_dict(read_tensors(folder / INFLUENCE))
        self.mixer.loader.load_state_dict(state["loader"])
        self.mixer.load_state_dict(state["mixer"])


class _Steps(TrainerCallback):
    """Ends a plan step with each optimizer step, and adds up what the decisions were made of."""

    def __init__(self, mixer: Mixer):
        self.mixer = mixer
        self._decision = mixer.decision
        self._sums: dict[str, tuple[float, int]] = {}  # nats and tokens of each domain since the last log

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.mixer.step()
        # Trainer counts epochs from its start, as it was told not to skip data.
        state.epoch = state.global_step / state.max_steps
        decision = self.mixer.decision
        if decision is None or decision is self._decision:
            return
        self._decision = decision
        for name, loss, tokens in zip(self.mixer.loader.names, decision.loss, decision.loss_tokens, strict=False):
            if tokens and math.isfinite(loss):
                nats, before = self._sums.get(name, (0.0, 0))
                self._sums[name] = (nats + float(loss) * int(tokens), before + int(tokens))

    def metrics(self) -> dict[str, float]:
        """Weights of the step that comes next, and of each domain its loss in nats a token, its tokens and epochs."""
        loader = self.mixer.loader
        found = {f"mix/weight/{name}": float(w) for name, w in zip(loader.names, loader.weights, strict=True)}
        found |= {f"mix/loss/{name}": nats / tokens for name, (nats, tokens) in self._sums.items()}
        self._sums = {}
        for name, account in loader.accounts().items():
            found |= {f"mix/tokens/{name}": account.tokens, f"mix/epochs/{name}": account.epochs}
        return found


class _Batches:
    """Batches of a loader or a HeldOut, with the next tokens as `labels` that nobody shifts again.

    transformers 5 counts the targets in `shift_labels` where it is there, 4.57 in `labels`.
    """

    def __init__(self, batches: Iterable[dict[str, Any]]):
        self._batches = batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._batches:
            tensors = {key: batch[key] for key in ("input_ids", "domain_ids", "position_ids") if key in batch}
            yield tensors | {"labels": batch["targets"], "shift_labels": batch["targets"]}


def last_checkpoint(output_dir: str | Path) -> Path:
    """The folder checkpoint-N of the highest step that is whole; raises StateError if there is none."""
    folders = {
        int(match[1]): path
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)) and _is_whole(path)
    }
    if not folders:
        raise StateError(
            f"{output_dir} holds no whole checkpoint of a MixTrainer; begin without resume_from_checkpoint"
        )
    return folders[max(folders)]


def _is_whole(folder: Path) -> bool:
    """Whether Trainer came to write trainer_state.json to its end, which comes last."""
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (folder / STATE).exists()


def _logits(outputs: Any) -> Tensor:
    """What the head gave, of a model that was given no labels."""
    return outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]


def _vocab_size(model: Any) -> int:
    """Ids that the model has an embedding for, which may be more than its config says."""
    return int(model.get_input_embeddings().num_embeddings)


def _check_vocab(loader: MixLoader, model: nn.Module) -> None:
    size = _vocab_size(model)
    for whose, found in (("the data have", loader.manifest.vocab_size), ("the loader has", loader.vocab_size)):
        if found is not None and found > size:
            raise ConfigError(
                f"{whose} a vocabulary of {found} ids, but the model embeds {size}; use the tokenizer that the data "
                "were packed with, or model.resize_token_embeddings()"
            )


def _check_version() -> None:
    found = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])
    if not TESTED[0] <= found <= TESTED[1]:
        low, high = (".".join(map(str, version)) for version in TESTED)
        warnings.warn(
            f"transformers is {transformers.__version__}; mixloader's Trainer was tested with {low} to {high}: compare "
            "the losses of a few steps with a version in between before you rely on it",
            RuntimeWarning,
            stacklevel=3,
        )


def _check(trainer: MixTrainer, mixer: Mixer, model: Any) -> None:
    """Raise ConfigError for what would train on other batches than `args` say, or not at all."""
    args, loader = trainer.args, mixer.loader
    _check_vocab(loader, model)
    # With data-parallel ranks only some of the processes read batches of their own, so the loader may have fewer.
    agree = {
        "per_device_train_batch_size": (args.per_device_train_batch_size, loader.batch_size),
        "gradient_accumulation_steps": (args.gradient_accumulation_steps, loader.grad_accumulation_steps),
        "the number of processes": (args.world_size % loader.world_size, 0),
    }
    for name, (asked, has) in agree.items():
        if asked != has:
            raise ConfigError(
                f"{name} is {asked} for the Trainer, and {has} for the loader; make the loader with trainer_loader()"
            )
    if args.max_steps <= 0 and loader.max_steps is None:
        raise ConfigError("the run has no end: set max_steps in the TrainingArguments (a mixture has no epochs)")
    if loader.max_steps is not None and args.max_steps > loader.max_steps:
        raise ConfigError(
            f"max_steps is {args.max_steps} for the Trainer, but the loader ends after {loader.max_steps}; give both "
            "the same"
        )
    refused = {
        "auto_find_batch_size": args.auto_find_batch_size,
        "compute_loss_func, which never sees domains": trainer.compute_loss_func is not None,
        "model_init together with influence": trainer.model_init is not None and mixer.influence is not None,
        "output_router_logits": getattr(model.config, "output_router_logits", False),
        "several GPUs in one process (start one for each with torchrun)": args.n_gpu > 1,
    }
    for name, given in refused.items():
        if given:
            raise ConfigError(f"MixTrainer cannot honour {name}; leave it out")
    if mixer.stats.device.type != args.device.type:
        raise ConfigError(
            f"the Mixer counts on {mixer.stats.device}, but the Trainer trains on {args.device}; make it with "
            "Mixer(..., device=args.device)"
        )
