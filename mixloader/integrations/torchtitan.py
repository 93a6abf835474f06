"""torchtitan: its trainer over a MixLoader, with a policy, and all their state in its checkpoints.

In a config registry of your own, around any of torchtitan's configs (`--module my.config --config mixed`):

    def mixed():
        return with_mixture(llama3_8b(), "data/manifest.json", policy="agent")

Tested with torchtitan 0.3.0, whose interfaces change between versions. docs/torchtitan.md.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from mixloader.batch import IGNORED
from mixloader.errors import ConfigError, StateError
from mixloader.loader import MixLoader
from mixloader.loss import domain_cross_entropy
from mixloader.mixer import Mixer
from mixloader.trackers import MixtureTracker

try:
    import tyro
    from torchtitan.components.dataloader import BaseDataLoader
    from torchtitan.components.loss import BaseLoss
    from torchtitan.components.tokenizer import BaseTokenizer
    from torchtitan.config import CompileConfig
    from torchtitan.tools.utils import get_local_device
    from torchtitan.trainer import Trainer
except ImportError as error:
    raise ConfigError(f"this integration needs torchtitan 0.3 with all that it requires: {error}") from error


def with_mixture(
    config: Trainer.Config,
    data: Any,
    *,
    policy: str | None = "agent",
    mixer: Mapping[str, Any] | None = None,
    **loader: Any,
) -> MixTrainer.Config:
    """A config of torchtitan that reads a MixLoader and mixes; everything else in it stays.

    data: a manifest's path, or what Manifest.open takes. policy: a name, or None for weights that stay. mixer: further
    arguments of Mixer and of the policy. loader: of MixLoader. Sizes, ranks and steps are those of the config.
    """
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    values["dataloader"] = MixDataLoader.Config(data=data, policy=policy, mixer=dict(mixer or {}), loader=loader)
    values["loss"] = MixLoss.Config()
    return MixTrainer.Config(**values)


class NoTokenizer(BaseTokenizer):
    """For shards, which hold ids: torchtitan makes a tokenizer, and here nobody asks it for anything."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, **_: Any):
        super().__init__()

    def encode(self, *_: Any, **__: Any) -> list[int]:
        raise ConfigError("there is no tokenizer in this run; set `tokenizer` in its config to have one")

    def decode(self, *_: Any, **__: Any) -> str:
        raise ConfigError("there is no tokenizer in this run; set `tokenizer` in its config to have one")

    def get_vocab_size(self) -> int:
        raise ConfigError("there is no tokenizer in this run; set `tokenizer` in its config to have one")


class MixDataLoader(BaseDataLoader):
    """Micro-batches of a MixLoader, as ({"input", "positions", "domain_ids"}, labels), and the Mixer of the run.

    Its state is that of both, one JSON text that is the same on every rank, for torch.distributed.checkpoint; it may be
    loaded on another number of ranks.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        data: Annotated[Any, tyro.conf.Suppress] = None
        policy: str | None = "agent"
        mixer: Annotated[dict[str, Any], tyro.conf.Suppress] = field(default_factory=dict)
        loader: Annotated[dict[str, Any], tyro.conf.Suppress] = field(default_factory=dict)
        # What the trainer knows, and does not tell its dataloader.
        global_batch_size: Annotated[int, tyro.conf.Suppress] = -1
        steps: Annotated[int | None, tyro.conf.Suppress] = None
        vocab_size: Annotated[int | None, tyro.conf.Suppress] = None

    def __init__(
        self, config: Config, *, dp_world_size: int, dp_rank: int, seq_len: int, local_batch_size: int, **_: Any
    ):
        rows = config.global_batch_size if config.global_batch_size > 0 else local_batch_size * dp_world_size
        device = get_local_device()
        own = {"vocab_size": config.vocab_size, "pin_memory": device.type == "cuda"}
        self.loader = MixLoader(
            config.data, local_batch_size, seq_len, global_batch=rows, world_size=dp_world_size, rank=dp_rank,
            max_steps=config.steps, **own | config.loader,
        )  # fmt: skip
        known = self.loader.manifest.vocab_size
        if known is not None and config.vocab_size is not None and known > config.vocab_size:
            raise ConfigError(f"the data has ids below {known}, but the model a vocabulary of {config.vocab_size}")
        self.mixer = None if config.policy is None else Mixer(self.loader, config.policy, device=device, **config.mixer)
        self._positions = torch.arange(seq_len).expand(local_batch_size, seq_len)
        self._begun = False

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        self._begun = True
        for batch in self.loader:
            # Without positions, torchtitan builds no causal mask for flex attention.
            positions = batch.get("position_ids", self._positions)
            yield (
                {"input": batch["input_ids"], "positions": positions, "domain_ids": batch["domain_ids"]},
                batch["targets"],
            )

    def state_dict(self) -> dict[str, Any]:
        if not self._begun:
            # torch.distributed.checkpoint asks for it before it loads another; a mixer would begin its record.
            return {"mixloader": ""}
        mixer = None if self.mixer is None else self.mixer.state_dict()
        return {"mixloader": json.dumps({"loader": self.loader.state_dict(), "mixer": mixer})}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if "mixloader" not in state_dict:
            raise StateError("the checkpoint holds no state of a MixLoader; it was saved with another dataloader")
        if not state_dict["mixloader"]:
            return  # saved before the first step
        state = json.loads(state_dict["mixloader"])
        if (state["mixer"] is None) != (self.mixer is None):
            raise StateError(
                f"the checkpoint is of a run {'without' if state['mixer'] is None else 'with'} a policy, and this one "
                "is not; resume with the settings of the run that saved it"
            )
        self.loader.load_state_dict(state["loader"])
        if self.mixer is not None:
            self.mixer.load_state_dict(state["mixer"])
        self._begun = True

    def close(self, finish: bool = False) -> None:
        """finish: the run came to its end, which the record tells."""
        if self.mixer is not None:
            self.mixer.__exit__(None if finish else StateError)
        self.loader.close()


class MixLoss(BaseLoss):
    """The sum of token losses over the tokens of all ranks, as torchtitan scales it, counted by domain for the policy.

    The logits are held whole: `ChunkedLossWrapper` is not supported, nor logits spread over tensor-parallel ranks.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        pass

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None):
        self.mixer: Mixer | None = None
        self._ids: Tensor | None = None
        self._weights: Tensor | None = None

    def begin(self, domain_ids: Tensor) -> None:
        """Before the forward pass of a micro-batch, and outside of a CUDA graph, which reads what is put here.

        domain_ids: int64 [B], on the device of the logits.
        """
        if self._ids is None or self._ids.shape != domain_ids.shape:
            self._ids = torch.empty_like(domain_ids)
        self._ids.copy_(domain_ids)
        self._weights = None if self.mixer is None else self.mixer.domain_weights

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self.mixer is not None and torch.is_grad_enabled():  # not the losses of a validation
            loss = domain_cross_entropy(
                pred, labels, self._ids, stats=self.mixer.stats, domain_weights=self._weights, reduction="sum"
            )
        else:
            loss = nn.functional.cross_entropy(
                pred.flatten(0, 1).float(), labels.flatten(0, 1), ignore_index=IGNORED, reduction="sum"
            )
        return (loss if global_valid_tokens is None else loss / global_valid_tokens), {}


class MixTrainer(Trainer):
    """torchtitan's trainer, which tells the loss of domains, and the mixer of the end of each optimizer step."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        pass

    dataloader: MixDataLoader
    loss_fn: MixLoss

    def __init__(self, config: Config):
        if config.parallelism.pipeline_parallel_degree > 1:
            raise ConfigError("pipeline parallelism is not supported: set parallelism.pipeline_parallel_degree to 1")
        # After the command line, which may have changed them.
        config.dataloader.global_batch_size = config.training.global_batch_size
        config.dataloader.steps = config.training.steps
        config.dataloader.vocab_size = getattr(config.model_spec.model, "vocab_size", None)
        super().__init__(config)
        self.loss_fn.mixer = mixer = self.dataloader.mixer
        self._tracker = None if mixer is None else MixtureTracker(mixer, [_Metrics(self)])

    def post_dataloading_process(
        self, input_dict: dict[str, Tensor], labels: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        self.loss_fn.begin(input_dict.pop("domain_ids"))
        return super().post_dataloading_process(input_dict, labels)

    def train_step(self, data_iterator: Iterator[tuple[dict[str, Tensor], Tensor]]) -> None:
        super().train_step(data_iterator)
        if self.dataloader.mixer is not None:
            self.dataloader.mixer.step()

    def close(self) -> None:
        if hasattr(self, "dataloader"):
            self.dataloader.close(finish=self.step == self.config.training.steps)
        super().close()


class _Metrics:
    """torchtitan's own TensorBoard or Weights & Biases, if it has one, as a Tracker."""

    def __init__(self, trainer: MixTrainer):
        self.logger = trainer.metrics_processor.logger

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.logger.log(dict(values), step)

    def close(self) -> None:
        pass
