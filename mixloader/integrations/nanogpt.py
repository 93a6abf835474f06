"""For scripts in the style of nanoGPT: a `get_batch`, and a loss that tells a Mixer how each domain does.

docs/nanogpt.md has the five lines that change in nanoGPT's own train.py, and how late a change of weights is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from mixloader.batch import IGNORED
from mixloader.errors import ConfigError, MixLoaderError, StateError
from mixloader.influence import Influence
from mixloader.loader import MixLoader
from mixloader.loss import domain_cross_entropy
from mixloader.mixer import Mixer

IGNORE_INDEX = -1
"""The target of a token without a loss, as nanoGPT's model has it."""

_WINDOWS = 64  # held-out ones of each domain that an evaluation goes round in


class MixedBatches:
    """`get_batch = mix = MixedBatches(...)`: batches of several domains in place of nanoGPT's.

    data: what MixLoader takes; nanoGPT's own train.bin and val.bin are read where they are. model: the bare GPT, before
        torch.compile or DDP wrap it. batch_size, block_size, gradient_accumulation_steps (of this rank), max_iters,
        eval_interval, device: nanoGPT's variables of these names; it trains max_iters + 1 steps, and saves checkpoints
        every eval_interval. Ranks are torch.distributed's.
    state: what state_dict() gave, to go on from there. influence: options of Influence, {} for none; measured only if
        given. loader: options of MixLoader beside these. mixer_options: of Mixer: policy, record, lag, guards, ...

    `mix('train')` gives (x, y) of the mixture, int64 [batch_size, block_size] on the device. Under torch.no_grad(), as
    in estimate_loss(), 'train' and 'val' give training and held-out windows that the training stream does not notice,
    the same in each evaluation and row by row from one domain after the other, so that each domain counts alike.

    Raises ConfigError if the data have ids that the model does not embed, StateError for a state of another run.
    """

    def __init__(
        self,
        data: Any,
        model: nn.Module,
        *,
        batch_size: int,
        block_size: int,
        gradient_accumulation_steps: int = 1,
        max_iters: int | None = None,
        eval_interval: int | None = None,
        device: torch.device | str = "cpu",
        seed: int = 1337,
        state: Mapping[str, Any] | None = None,
        influence: Mapping[str, Any] | None = None,
        loader: Mapping[str, Any] | None = None,
        **mixer_options: Any,
    ):
        self.device = torch.device(device)
        vocab_size = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
        loading: dict[str, Any] = {
            "grad_accumulation_steps": gradient_accumulation_steps,
            "max_steps": None if max_iters is None else max_iters + 1,
            "seed": seed,
            "vocab_size": vocab_size,
            "pin_memory": self.device.type == "cuda",
            **(loader or {}),
        }
        with ExitStack() as opened:
            self.loader = opened.enter_context(MixLoader(data, batch_size, block_size, **loading))
            self._check_vocab(vocab_size)
            if influence is not None:
                mixer_options["influence"] = Influence(model, logits=_logits, **influence)
            self.mixer = opened.enter_context(Mixer(self.loader, device=self.device, **mixer_options))
            if state is not None:
                self._load(state)
            opened.pop_all()
        self._eval_interval = eval_interval
        self._taken = None if state is None else dict(state)
        self._left = self.loader.grad_accumulation_steps  # micro-batches of this step that were not drawn yet
        self._promised: tuple[Tensor, Tensor] | None = None
        self._given: deque[tuple[Tensor, Tensor]] = deque(maxlen=2)  # targets and their domains
        self._evaluating: dict[str, Iterator[tuple[Tensor, Tensor]]] = {}

    def __call__(self, split: str) -> tuple[Tensor, Tensor]:
        """The next (x, y) of 'train', or an evaluation's (see above).

        The first micro-batch of the step after the one under way, which nanoGPT asks for before the backward pass, is
        promised: the tensors are given at once, and step() writes to them.
        """
        if split != "train" or not torch.is_grad_enabled():
            return self._beside(split)
        if self._promised is not None:
            raise MixLoaderError(
                "get_batch('train') was called twice after the last micro-batch of a step; call step() after each "
                "optimizer step"
            )
        self._evaluating = {}
        if not self._left:
            shape = self.loader.batch_size, self.loader.seq_len
            x, y = (torch.zeros(shape, dtype=torch.int64, device=self.device) for _ in range(2))
            self._promised = x, y
            return x, y
        return self._draw()

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean loss, a scalar, of logits [B, T, V] for the targets of get_batch('train'), counted by domain."""
        domain_ids = next((ids for y, ids in self._given if y is targets), None)
        if domain_ids is None:
            promised = self._promised is not None and targets is self._promised[1]
            raise MixLoaderError(
                "the batch was promised and is not there yet: call step() after each optimizer step"
                if promised
                else "the targets are not those that get_batch('train') gave; hand the very same tensor to loss()"
            )
        return domain_cross_entropy(
            logits,
            targets,
            domain_ids,
            stats=self.mixer.stats,
            domain_weights=self.mixer.domain_weights,
            ignore_index=IGNORE_INDEX,
        )

    def step(self) -> None:
        """After each optimizer step: ends the plan step, and keeps the promise of the next batch.

        After the last of max_iters + 1 steps it closes loader and Mixer.
        """
        self.mixer.step()
        self._left = self.loader.grad_accumulation_steps
        promised, self._promised = self._promised, None
        due = self._eval_interval is not None and self.loader.step % self._eval_interval == 0
        self._taken = self._state() if due else None
        if self.loader.max_steps is not None and self.loader.step >= self.loader.max_steps:
            self.close()
        elif promised is not None:
            self._draw(promised)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint, between step() and the next forward pass: plain values, and tensors of an Influence.

        nanoGPT holds the first batch of the next step by then, and of several ranks only one asks. So all take it in
        step(), every eval_interval steps, before that batch is drawn.
        """
        if self._promised is None and self._left == self.loader.grad_accumulation_steps:
            return self._state()
        if self._taken is None:
            raise MixLoaderError(
                "a batch of the next step was drawn already, and no state was taken before; checkpoints are possible "
                "every eval_interval steps: give eval_interval=, or ask for the state right after step()"
            )
        return self._taken

    def close(self) -> None:
        """End the record and the threads."""
        self.mixer.close()
        self.loader.close()

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"loader": self.loader.state_dict(), "mixer": self.mixer.state_dict()}
        if self.mixer.influence is not None:
            state["influence"] = self.mixer.influence.state_dict()
        return state

    def _load(self, state: Mapping[str, Any]) -> None:
        missing = {"loader", "mixer", *(() if self.mixer.influence is None else ("influence",))} - set(state)
        if missing:
            raise StateError(f"the state has no {min(missing)!r}; expected what MixedBatches.state_dict() gave")
        self.loader.load_state_dict(state["loader"])
        self.mixer.load_state_dict(state["mixer"])
        if self.mixer.influence is not None:
            self.mixer.influence.load_state_dict(state["influence"])

    def _draw(self, into: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        batch = next(self.loader)
        self._left -= 1
        x, y = self._on_device(batch, into)
        self._given.append((y, batch["domain_ids"].to(self.device, non_blocking=True)))
        return x, y

    def _on_device(
        self, batch: Mapping[str, Tensor], into: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64, those without a loss as nanoGPT's model marks them."""
        inputs, targets = batch["input_ids"], batch["targets"]
        if into is None:
            into = tuple(t.to(self.device, torch.int64, non_blocking=True) for t in (inputs, targets))  # type: ignore
        else:
            for tensor, values in zip(into, (inputs, targets), strict=True):
                tensor.copy_(values, non_blocking=True)
        assert into is not None
        if self.loader.format.masked:
            into[1].masked_fill_(into[1] == IGNORED, IGNORE_INDEX)
        return into

    # Beside the stream

    def _beside(self, split: str) -> tuple[Tensor, Tensor]:
        if split not in self._evaluating:
            self._evaluating[split] = self._rows(split)
        rows = [next(self._evaluating[split]) for _ in range(self.loader.batch_size)]
        x, y = (torch.cat(tensors) for tensors in zip(*rows, strict=True))
        y = y.masked_fill(y == IGNORED, IGNORE_INDEX)
        return x.to(self.device, torch.int64), y.to(self.device, torch.int64)

    def _rows(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows [1, T] of one domain after the other, without end."""
        loader = self.loader
        if split == "train":
            sources = [loader.probe(name, 1) for name in loader.names if name not in loader.removed]
        else:
            names = loader.held_out().names
            if not names:
                raise ConfigError(
                    f"get_batch({split!r}) has nothing to give: no domain has held-out tokens; name a file with `val`"
                )
            sources = [cycle(loader.held_out(1, domains=[name], windows_per_domain=_WINDOWS)) for name in names]
        for source in cycle(sources):
            batch = next(source)
            yield batch["input_ids"], batch["targets"]

    def _check_vocab(self, vocab_size: int) -> None:
        found = self.loader.manifest.vocab_size
        if found is not None and found > vocab_size:
            raise ConfigError(
                f"the data have a vocabulary of {found} ids, but the model has {vocab_size}; make the model with "
                f"vocab_size={found} or more"
            )


def _logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    """[B, T, V]: nanoGPT's model gives the last position's only, unless it has targets."""
    return model(input_ids, input_ids)[0]
