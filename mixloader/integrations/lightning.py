"""Lightning: a LightningDataModule that mixes, and the callback that ends its steps.

    data = MixDataModule("data/manifest.json", batch_size=12, seq_len=1024, policy="agent")
    trainer = Trainer(max_steps=10_000, callbacks=[MixCallback()])
    trainer.fit(module, datamodule=data)  # where module.training_step returns data.loss(logits, batch)

Loader, mixer and influence are saved in Lightning's own checkpoints and restored by `fit(..., ckpt_path=...)`.
Lightning reads a batch ahead of a loader whose length it does not know, before the step is trained that would change
the mixture, and would save a state that is a batch ahead; so the batches have a length here, and it does not.
docs/lightning.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mixloader.errors import ConfigError, MixLoaderError
from mixloader.evaluate import HeldOutFeedback
from mixloader.influence import Influence
from mixloader.loader import MixLoader
from mixloader.loss import domain_cross_entropy
from mixloader.mixer import Mixer
from mixloader.trackers import MixtureTracker

try:
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
except ImportError as error:
    raise ConfigError("this integration needs the package lightning; pip install 'mixloader[lightning]'") from error

if TYPE_CHECKING:
    from mixloader.policies import Policy


class MixDataModule(LightningDataModule):
    """Batches of a MixLoader for Trainer.fit, with the Mixer of the run; both are made when the fit begins.

    data, batch_size, seq_len, loader: as MixLoader has them; world size, rank, accumulation and max_steps are the
    Trainer's. policy: as Mixer has it, or None for a loader whose weights are set by hand. mixer: further arguments of
    Mixer (record, decide_every, lag, guards, ...) and of the policy. influence: options of Influence, {} for the
    defaults, None to measure none.

    Raises ConfigError where the fit begins, for a Trainer without max_steps or without a MixCallback.
    """

    def __init__(
        self,
        data: Any,
        batch_size: int,
        seq_len: int,
        *,
        policy: str | Policy | None = "agent",
        mixer: Mapping[str, Any] | None = None,
        influence: Mapping[str, Any] | None = None,
        **loader: Any,
    ):
        super().__init__()
        self._data, self._sizes, self._options = data, (batch_size, seq_len), loader
        self._policy, self._mixing, self._influence = policy, dict(mixer or {}), influence
        self._loader: MixLoader | None = None
        self.mixer: Mixer | None = None

    @property
    def loader(self) -> MixLoader:
        """The MixLoader of the fit under way."""
        if self._loader is None:
            raise MixLoaderError("there is no loader before Trainer.fit has asked for batches, and none after it")
        return self._loader

    def train_dataloader(self) -> TrainBatches:
        trainer = self.trainer
        if trainer is None:
            raise ConfigError("the data module has no Trainer; give it to one: trainer.fit(module, datamodule=...)")
        self._close(finish=False)
        if self._policy is not None and not any(isinstance(callback, MixCallback) for callback in trainer.callbacks):
            raise ConfigError("no MixCallback ends the steps of the mixer; add one: Trainer(callbacks=[MixCallback()])")
        max_steps = self._options.get("max_steps", trainer.max_steps if trainer.max_steps > 0 else None)
        if max_steps is None:
            raise ConfigError("the length of the run is not known; give Trainer(max_steps=...) or max_steps=...")
        # Of the data-parallel ranks: what Lightning tells DistributedSampler, which is None in a single process.
        ranks = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        device = trainer.strategy.root_device
        own = {
            "grad_accumulation_steps": trainer.accumulate_grad_batches,
            "world_size": ranks["num_replicas"],
            "rank": ranks["rank"],
            "pin_memory": device.type == "cuda",
        }
        self._loader = MixLoader(self._data, *self._sizes, **own | self._options | {"max_steps": max_steps})
        if self._policy is not None:
            influence = None
            if self._influence is not None:
                influence = Influence(trainer.lightning_module, **self._influence)
            self.mixer = Mixer(self._loader, self._policy, device=device, influence=influence, **self._mixing)
        return TrainBatches(self._loader, self.mixer)

    def loss(self, logits: Tensor, batch: Mapping[str, Any], **options: Any) -> Tensor:
        """Mean cross-entropy of logits [B, T, V], which counts the losses of each domain for the policy.

        batch: as training_step has it. options: of domain_cross_entropy.
        """
        mixing = {}
        if self.mixer is not None and logits.requires_grad:  # not the losses of a validation
            mixing = {"stats": self.mixer.stats, "domain_weights": self.mixer.domain_weights}
        return domain_cross_entropy(logits, batch["targets"], batch["domain_ids"], **mixing | options)

    def teardown(self, stage: str) -> None:
        if stage == "fit":
            self._close(finish=True)

    def on_exception(self, exception: BaseException) -> None:
        self._close(finish=False)

    def _close(self, finish: bool) -> None:
        """finish: the run came to its end, which the record tells."""
        if self.mixer is not None:
            self.mixer.__exit__(None if finish else MixLoaderError)
        if self._loader is not None:
            self._loader.close()
        self.mixer, self._loader = None, None


class TrainBatches:
    """What Lightning draws from: a loader with the length of the whole run, and the state of all that mixes.

    Batches are dicts as MixLoader has them.
    """

    def __init__(self, loader: MixLoader, mixer: Mixer | None):
        self.loader, self.mixer = loader, mixer

    def __iter__(self) -> TrainBatches:
        return self

    def __next__(self) -> dict[str, Any]:
        return next(self.loader)

    def __len__(self) -> int:
        """Micro-batches of the whole run: Lightning adds those of before a resume to what it has drawn itself."""
        assert self.loader.max_steps is not None
        return self.loader.max_steps * self.loader.grad_accumulation_steps

    def state_dict(self) -> dict[str, Any]:
        mixer = self.mixer
        return {
            "loader": self.loader.state_dict(),
            "mixer": None if mixer is None else mixer.state_dict(),
            "influence": None if mixer is None or mixer.influence is None else mixer.influence.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if (state["mixer"] is None) != (self.mixer is None):
            raise ConfigError(
                f"the checkpoint is of a run {'without' if state['mixer'] is None else 'with'} a policy, and this one "
                "is not; resume with the settings of the run that saved it"
            )
        self.loader.load_state_dict(state["loader"])
        if self.mixer is not None:
            if self.mixer.influence is not None:
                self.mixer.influence.load_state_dict(state["influence"])
            self.mixer.load_state_dict(state["mixer"])


class MixCallback(Callback):
    """Ends the plan step of a MixDataModule's mixer after each optimizer step, and logs what it decides.

    log: tell Trainer's loggers of each decision, under the names of trackers.py. feedback_every: plan steps between
    held-out losses that are reported to the policy, None for never; the module's forward(input_ids) gives the logits.
    """

    def __init__(self, *, log: bool = True, feedback_every: int | None = None):
        self._log, self._feedback_every = log, feedback_every
        self._feedback: HeldOutFeedback | None = None
        self._tracker: MixtureTracker | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        mixer = _mixer_of(trainer)
        if mixer is None:
            return
        if self._log and trainer.loggers:
            self._tracker = MixtureTracker(mixer, [_Loggers(trainer)])
        if self._feedback_every is not None:
            self._feedback = HeldOutFeedback(mixer, pl_module, self._feedback_every)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        mixer = _mixer_of(trainer)
        # As Lightning accumulates: the optimizer has stepped after the last micro-batch.
        if mixer is not None and batch["micro_step"] == mixer.loader.grad_accumulation_steps - 1:
            mixer.step()
            if self._feedback is not None:
                with trainer.precision_plugin.forward_context(), torch.no_grad():
                    self._feedback.step()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tracker = self._feedback = None


class _Loggers:
    """Lightning's loggers as a Tracker."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for logger in self.trainer.loggers:
            logger.log_metrics(dict(values), step=step)

    def close(self) -> None:
        pass


def _mixer_of(trainer: Trainer) -> Mixer | None:
    module = getattr(trainer, "datamodule", None)
    return module.mixer if isinstance(module, MixDataModule) else None
