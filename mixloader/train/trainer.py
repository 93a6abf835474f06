"""The reference training loop: loader, model, loss with statistics, optimizer, mixer; exact resume.

Run it as `python -m mixloader train config.yaml`, or under torchrun on several processes (distributed.py). The same
command on a run that was killed goes on from its latest checkpoint, and the run ends with the parameters and the
record that it would have had anyway: bit for bit on a CPU with as many threads and processes; on a GPU as far as its
kernels repeat themselves.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mixloader.config import TrainConfig
from mixloader.errors import ConfigError
from mixloader.evaluate import field_means, held_out_loss
from mixloader.files import replace, sync
from mixloader.influence import Influence
from mixloader.loader import MixLoader
from mixloader.loss import domain_cross_entropy
from mixloader.manifest import Manifest
from mixloader.mixer import Mixer
from mixloader.ranks import Ranks
from mixloader.trackers import MixtureTracker, open_trackers
from mixloader.train import checkpoint as checkpoints
from mixloader.train.distributed import data_parallel, joined, mean_over, without_sync
from mixloader.train.hf_checkpoint import fit_config, is_hf_folder
from mixloader.train.model import build_model
from mixloader.train.optimizer import build_optimizer, learning_rate_at
from mixloader.train.parts import open_answers, open_guards, open_reference, policy_options
from mixloader.train.run import RunFolder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a run ended with. Losses are held-out, in nats a token, by domain.

    tokens_per_second: training alone, without evaluation and checkpoints.
    """

    losses_before: dict[str, float]
    losses_after: dict[str, float]
    steps: int
    tokens: int
    tokens_per_second: float
    record: Path
    checkpoint: Path


def train(config: TrainConfig, *, progress: bool | None = None) -> TrainResult:
    """Train as `config` says, going on from the latest checkpoint in `config.out` if there is one.

    progress: a bar with loss, tokens/s and time left; None shows it on a terminal only.
    Raises a MixLoaderError before any work if the data, the folder or a value is not usable, and StateError if
    `out` holds a run of another config. A finished run is not trained again: its result is returned.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with joined(config.device) as (ranks, device_name), ExitStack() as stack:
        device = resolve_device(device_name)
        manifest = Manifest.open(config.data, roots=config.roots)
        config = resolve(config, manifest, device)
        folder = RunFolder(config.out, writes=ranks.leads)

        def begin() -> dict[str, Any]:
            stack.enter_context(folder)
            return identity_of(config, manifest, ranks)

        ranks.agree(begin, "in what they train")
        found = ranks.told(lambda: folder.find(identity_of(config, manifest, ranks)))
        resume_from = None if found["checkpoint"] is None else Path(found["checkpoint"])
        if found["result"] is not None and resume_from is not None:
            log.info("%s holds this run, finished; nothing was trained again", folder.path)
            return TrainResult(**found["result"], record=folder.record, checkpoint=resume_from)
        with Trainer(config, manifest, device, folder, resume_from, ranks) as trainer:
            return trainer.run(progress)


def identity_of(config: TrainConfig, manifest: Manifest, ranks: Ranks) -> dict[str, Any]:
    """What tells a run from others, as plain values."""
    several = {} if ranks.alone else {"world_size": len(ranks.members)}
    return {**config.to_dict(), "manifest": manifest.fingerprint, **several}


def resolve_device(name: str) -> torch.device:
    """The device that `name` means; raises ConfigError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f'device is {name!r}; expected "auto", "cpu", "cuda" or "cuda:1"') from error
    there = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(device.type, 0)
    if (device.index or 0) >= there:
        raise ConfigError(f"device is {name!r}, which this machine and this torch do not have; use another device")
    return device


def resolve(config: TrainConfig, manifest: Manifest, device: torch.device) -> TrainConfig:
    """`config` with what it left to the data, the hardware and a model to start from filled in.

    Raises ConfigError if they disagree.
    """
    model, vocab_size = config.model, manifest.vocab_size
    if config.init_from is not None and is_hf_folder(Path(config.init_from)):
        model = fit_config(model, Path(config.init_from))
    if model.vocab_size is None and vocab_size is None:
        raise ConfigError("model.vocab_size is not set, and the data does not say it either; set it")
    if model.vocab_size is not None and vocab_size is not None and model.vocab_size < vocab_size:
        raise ConfigError(
            f"model.vocab_size is {model.vocab_size}, but the data has ids below {vocab_size}; raise it or leave it out"
        )
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    model = dataclasses.replace(
        model, vocab_size=model.vocab_size or vocab_size, seq_len=model.seq_len or config.seq_len
    )
    return dataclasses.replace(config, model=model, dtype=dtype)


class Trainer:
    """The parts of one run, built and checked before the first step; close it to release them."""

    def __init__(
        self,
        config: TrainConfig,
        manifest: Manifest,
        device: torch.device,
        folder: RunFolder,
        resume_from: Path | None,
        ranks: Ranks,
    ) -> None:
        self.config, self.manifest, self.device, self.folder = config, manifest, device, folder
        self.ranks = ranks
        self.step = 0
        self.seconds = 0.0
        torch.manual_seed(config.seed)
        self.model = build_model(config.model)
        if config.init_from is not None and resume_from is None:
            checkpoints.load_parameters(Path(config.init_from), self.model)
        self.model.to(device)
        self.forward = data_parallel(self.model, device, ranks)
        if not ranks.leads:
            torch.manual_seed(config.seed + dist.get_rank())  # for dropout of its own
        self.optimizer = build_optimizer(self.model, config)
        self.reference = open_reference(config, self.model, device)
        self.answers = open_answers(config, self.model, manifest)
        self._stack = ExitStack()
        with ExitStack() as opened:
            self.loader = opened.enter_context(self._open_loader())
            self.tokens_per_step = self.loader.global_batch * config.seq_len
            trackers = open_trackers(config.trackers, folder.path)
            self.mixer = self._open_mixer()
            # Closed after the mixer, whose last decisions it is told of.
            self.tracker = opened.enter_context(MixtureTracker(self.mixer, trackers))
            opened.enter_context(self.mixer)
            self.before: dict[str, float] = {}
            self.held_out: dict[str, float] = {}
            if resume_from is None:
                self._begin()
            else:
                self._resume(resume_from)
            self._stack = opened.pop_all()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *exception: Any) -> None:
        # The mixer ends its record in another way if the run did not end well.
        self._stack.__exit__(*exception)

    def run(self, progress: bool | None) -> TrainResult:
        """Train to the last step and write result.json."""
        config = self.config
        batches = self.tracker.timed(self.loader)
        with self._bar(progress) as bar:
            while self.step < config.steps:
                started = time.perf_counter()
                loss = self._train_step(batches)
                self.mixer.step()
                self.step += 1
                evaluate = self._due(config.eval_every)
                write = evaluate or self._due(config.log_every)
                # The only wait for the device, so it is also where the clock is right.
                value = mean_over(self.ranks, loss) if write else None
                self.seconds += time.perf_counter() - started
                bar.update(self.tokens_per_step)
                if value is not None:
                    bar.set_postfix_str(f"loss {value:.3f}", refresh=False)
                if evaluate:
                    self._evaluate()
                if write:
                    self._log(value, evaluate)
                if self._due(config.checkpoint_every):
                    self._save()
        return self._finish()

    def _due(self, every: int) -> bool:
        return self.step == self.config.steps or (every > 0 and self.step % every == 0)

    def _train_step(self, batches: Iterator[dict[str, Any]]) -> Tensor:
        """One optimizer step; returns its mean loss, on the device."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.step, config)
        total = torch.zeros((), device=self.device)
        for left in reversed(range(config.grad_accumulation_steps)):
            with without_sync(self.forward) if left else nullcontext():
                total += self._train_micro_batch(next(batches))
        if config.grad_clip > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def _train_micro_batch(self, batch: dict[str, Any]) -> Tensor:
        """Its share of the step's gradient; returns its share of the loss."""
        input_ids, targets, domain_ids = (
            batch[key].to(self.device, non_blocking=True) for key in ("input_ids", "targets", "domain_ids")
        )
        on_device = {"input_ids": input_ids, "targets": targets}
        reference = None if self.reference is None else self.reference(on_device)
        with self._autocast():
            logits = self.forward(input_ids)
        loss = domain_cross_entropy(
            logits,
            targets,
            domain_ids,
            stats=self.mixer.stats,
            reference_losses=reference,
            domain_weights=self.mixer.domain_weights,
        )
        # Every micro-batch has as many tokens, so the mean of their means is the mean of the step.
        loss = loss / self.config.grad_accumulation_steps
        loss.backward()
        return loss.detach()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _evaluate(self) -> None:
        with self._autocast():
            self.held_out = held_out_loss(
                self.model,
                self.manifest,
                seq_len=self.config.seq_len,
                windows_per_domain=self.config.eval_windows,
                batch_size=self.config.batch_size,
                vocab_size=self.config.model.vocab_size,
                device=self.device,
            )
        if self.config.feedback:
            self.mixer.feedback(self.held_out | field_means(self.held_out, self.manifest) | self._answer_losses())

    def _answer_losses(self) -> dict[str, float]:
        with self._autocast():
            return {
                name: answers.score(self.model, batch_size=self.config.batch_size, device=self.device).loss
                for name, answers in self.answers.items()
            }

    def _log(self, loss: float | None, evaluated: bool) -> None:
        line: dict[str, Any] = {"step": self.step, "tokens": self.step * self.tokens_per_step}
        if loss is not None:
            line |= {
                "learning_rate": self.optimizer.param_groups[0]["lr"],
                "loss": loss,
                "tokens_per_second": round(self._tokens_per_second()),
            }
        if evaluated:
            line["held_out"] = self.held_out
        self.folder.append_metrics(line)
        shown = {f"train/{key}": line[key] for key in ("loss", "learning_rate", "tokens_per_second") if key in line}
        shown |= {f"held_out/{name}": value for name, value in line.get("held_out", {}).items()}
        self.tracker.log(self.step, shown)

    def _tokens_per_second(self) -> float:
        return self.step * self.tokens_per_step / self.seconds

    def _begin(self) -> None:
        """A fresh run: losses before, and a checkpoint of step 0, so that a run killed at once is the same run."""
        self._evaluate()
        self.before = self.held_out
        self._log(None, True)
        self._save()

    def _save(self) -> None:
        state = {
            "config": identity_of(self.config, self.manifest, self.ranks),
            "loader": self.loader.state_dict(),
            "mixer": self.mixer.state_dict(),
            "losses_before": self.before,
            "held_out": self.held_out,
            "seconds": self.seconds,
            **({} if self.ranks.alone else {"rngs": self.ranks.gather(checkpoints.rng_state())}),
        }
        if not self.ranks.leads:
            return
        sync(self.folder.metrics)
        checkpoints.save_checkpoint(
            self.folder.path, self.step, self.model, self.optimizer, state, self.mixer.influence
        )
        checkpoints.remove_old(self.folder.path, self.config.keep_checkpoints)

    def _resume(self, path: Path) -> None:
        state = checkpoints.load_checkpoint(path, self.model, self.optimizer, self.mixer.influence)
        self.loader.load_state_dict(state["loader"])
        self.mixer.load_state_dict(state["mixer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.before, self.held_out = state["losses_before"], state["held_out"]
        self.folder.rewind_metrics(self.step)
        log.info("going on from %s", path)

    def _finish(self) -> TrainResult:
        result = {
            "losses_before": self.before,
            "losses_after": self.held_out,
            "steps": self.step,
            "tokens": self.step * self.tokens_per_step,
            "tokens_per_second": self._tokens_per_second(),
        }
        # The record is whole on disk before the result says that the run is.
        self._stack.close()

        def write() -> list[Any]:
            replace(self.folder.result, json.dumps(result, indent=1) + "\n")
            return [result, str(checkpoints.latest_checkpoint(self.folder.path))]

        result, latest = self.ranks.told(write)
        return TrainResult(**result, record=self.folder.record, checkpoint=Path(latest))

    def _open_loader(self) -> MixLoader:
        config = self.config
        return MixLoader(
            self.manifest,
            config.batch_size,
            config.seq_len,
            weights=config.weights,
            grad_accumulation_steps=config.grad_accumulation_steps,
            seed=config.seed,
            pin_memory=self.device.type == "cuda",
            max_steps=config.steps,
            vocab_size=config.model.vocab_size,
        )

    def _open_mixer(self) -> Mixer:
        config = self.config
        return Mixer(
            self.loader,
            config.policy,
            decide_every=config.decide_every,
            lag=config.lag,
            token_budget=config.steps * self.tokens_per_step,
            device=self.device,
            record=self.folder.record,
            influence=self._influence(),
            act=config.act,
            guards=open_guards(config),
            record_detail=config.record_detail,
            **policy_options(config),
        )

    def _influence(self) -> Influence | None:
        if self.config.influence is None:
            return None
        dtype = None if self.config.dtype == "float32" else torch.bfloat16
        try:
            return Influence(self.model, **{"dtype": dtype, **self.config.influence})
        except TypeError as error:
            raise ConfigError(f"influence cannot be measured with options {self.config.influence}: {error}") from error

    def _bar(self, progress: bool | None) -> Any:
        from tqdm import tqdm

        return tqdm(
            desc=self.folder.path.name,
            total=self.config.steps * self.tokens_per_step,
            initial=self.step * self.tokens_per_step,
            unit="tok",
            unit_scale=True,
            disable=True if not self.ranks.leads else None if progress is None else not progress,
        )
