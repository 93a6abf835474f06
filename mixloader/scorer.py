"""Reference losses: what another model makes of the domains, as means in a file or token by token beside a run.

Policies that steer by the distance to a reference (DoReMi, dynamic batch loading, Velocitune) take the file's losses as
`reference_losses` or `target_losses`; `Reference` gives the losses of single tokens to domain_cross_entropy, for the
excess max(0, loss - reference loss) of each token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixloader.batch import IGNORED
from mixloader.errors import ConfigError
from mixloader.evaluate import evaluating, logits_of
from mixloader.files import replace
from mixloader.heldout import HeldOut
from mixloader.loader import MixLoader
from mixloader.loss import domain_cross_entropy
from mixloader.manifest import Manifest

VERSION = 1


class Reference:
    """A frozen model whose token losses others are compared with.

    model: from input_ids int64 [B, T] to logits [B, T, V], or to an output with `.logits`. It is put into `eval()` mode
        and its parameters want no gradients any more; what device it is on is the caller's choice.
    dtype: of autocast, torch.bfloat16 where the trained model's losses are computed with it.
    """

    def __init__(self, model: nn.Module, *, dtype: torch.dtype | None = None):
        self.model, self.dtype = model.eval().requires_grad_(False), dtype

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> Tensor:
        """float32 [B, T]: nats of each target of a batch, 0 where it is ignored. Nothing is added to statistics.

        batch: with "input_ids" and "targets", as a MixLoader gives them. The losses are on the model's device, where
        domain_cross_entropy(..., reference_losses=...) wants them to be.
        """
        device = next(self.model.parameters()).device
        inputs, targets = (batch[key].to(device, non_blocking=True).long() for key in ("input_ids", "targets"))
        with torch.autocast(device.type, dtype=self.dtype) if self.dtype is not None else nullcontext():
            logits = logits_of(self.model, inputs)
        return domain_cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none").float()


@dataclass(frozen=True)
class DomainScore:
    """The loss of a model on a domain, in nats a token.

    standard_error: of the mean, over windows (tokens of one window depend on each other); NaN for a single window.
    """

    loss: float
    standard_error: float
    tokens: int
    windows: int


def score_domains(
    model: nn.Module,
    manifest: Manifest,
    *,
    seq_len: int,
    split: str = "train",
    windows_per_domain: int | None = 256,
    batch_size: int = 16,
    vocab_size: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, DomainScore]:
    """Run a model once over the domains of a manifest; its loss on each, by name.

    split: "train", windows drawn without repetition in an order that `seed` sets, or "held_out", windows spread evenly.
    windows_per_domain: at most so many windows of `seq_len` tokens; None takes all.
    Held-out domains without tokens are left out. The model is in `eval()` mode meanwhile. autocast is the caller's
    choice. Raises ConfigError for another split, TokenError and ShardError as the loader does.
    """
    if split not in ("train", "held_out"):
        raise ConfigError(f"split is {split!r}; expected 'train' or 'held_out'")
    if windows_per_domain is not None and windows_per_domain < 1:
        raise ConfigError(f"windows_per_domain is {windows_per_domain}; expected 1 or more, or None for all")
    names = manifest.names if split == "train" else HeldOut(manifest, batch_size, seq_len).names
    scores = {}
    with evaluating(model), torch.no_grad():
        for name in names:
            if split == "train":
                batches = _windows(manifest, name, seq_len, windows_per_domain, batch_size, vocab_size, seed)
            else:
                batches = iter(
                    HeldOut(
                        manifest, batch_size, seq_len, windows_per_domain=windows_per_domain, domains=[name],
                        vocab_size=vocab_size,
                    )
                )  # fmt: skip
            scores[name] = _score(model, batches, device)
    return scores


def _windows(
    manifest: Manifest, name: str, seq_len: int, count: int | None, batch_size: int, vocab_size: int | None, seed: int
) -> Iterator[dict[str, Any]]:
    """Batches of `count` windows of a domain, or of all of them, each once."""
    only = Manifest((manifest.domain(name),), manifest.vocab_size, manifest.eot, manifest.tokenizer)
    with MixLoader(
        only, batch_size, seq_len, world_size=1, rank=0, seed=seed, num_workers=0, vocab_size=vocab_size
    ) as loader:
        windows = int(loader.windows[0]) if count is None else min(int(loader.windows[0]), count)
        for batch in islice(loader, -(-windows // batch_size)):
            yield {key: batch[key][:windows] for key in ("input_ids", "targets")}
            windows -= len(batch["targets"])


def _score(model: nn.Module, batches: Iterator[dict[str, Any]], device: torch.device | str) -> DomainScore:
    sums, counts = [], []
    for batch in batches:
        inputs, targets = (batch[key].to(device, non_blocking=True) for key in ("input_ids", "targets"))
        losses = domain_cross_entropy(logits_of(model, inputs), targets, ignore_index=IGNORED, reduction="none")
        sums.append(losses.double().sum(dim=1))
        counts.append((batch["targets"] != IGNORED).sum(dim=1))
    of_window, tokens = torch.cat(sums).cpu(), torch.cat(counts)
    loss, n = float(of_window.sum() / tokens.sum()), len(tokens)
    # Windows may have different numbers of tokens: the error of a ratio.
    spread = float((of_window - loss * tokens).square().sum())
    error = math.sqrt(spread * n / (n - 1)) / int(tokens.sum()) if n > 1 else math.nan
    return DomainScore(loss, error, int(tokens.sum()), n)


def write_losses(path: str | Path, domains: Mapping[str, DomainScore | Mapping[str, Any]], **about: Any) -> None:
    """Write losses by domain, and `about` how they came to be, as a JSON file for read_losses."""
    plain = {name: asdict(of) if isinstance(of, DomainScore) else dict(of) for name, of in domains.items()}
    for values in plain.values():
        values.update({key: None for key, value in values.items() if isinstance(value, float) and math.isnan(value)})
    content = {"version": VERSION, **about, "domains": plain}
    replace(Path(path), json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_losses(path: str | Path) -> dict[str, float]:
    """Nats a token by domain, of a file that write_losses wrote; what policies take as reference or target losses.

    Raises ConfigError for a file that is none.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise ConfigError(f"{path} has version {content['version']!r}; this mixloader reads version {VERSION}")
        losses = {str(name): float(values["loss"]) for name, values in content["domains"].items()}
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"cannot read losses from {path}: {type(error).__name__}: {error}; expected a file that "
            "`python -m mixloader score` wrote"
        ) from error
    if not all(map(math.isfinite, losses.values())):
        raise ConfigError(f"{path} holds a loss that is no finite number; score the domains again")
    return losses
