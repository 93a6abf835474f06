"""Sketches of a row's weight gradients, as gradients of zeros.

In a linear layer the gradient of the weight for one row of the batch is the sum over the row's tokens of
(input ⊗ output gradient). With fixed random matrices P (in x r) and Q (out x r) of signs, the r x r matrix
sum over tokens of (P' input)(Q' output gradient)' / r is a sketch of it: inner products of sketches are
unbiased estimates of those of the gradients (E[PP'] = r 1, so E<P'AQ, P'BQ> = r² <A, B>).

A forward hook lets the output through a Tap, which computes nothing and hands the sketch of every row to autograd
as the gradient of a tensor of zeros. So autograd itself sees to it that a recomputation under activation
checkpointing counts once, and torch.compile keeps the whole model in one graph. Parameters and their gradients are
bit for bit what they are without.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mixloader.errors import ConfigError


class Sketcher:
    """Hooks on the linear layers of a model, which take sketches of the passes that `zeros` were made for.

    rank: r. layers: shell patterns of the names of modules ("*.mlp.*"); by default the linear layers inside of
        blocks (of an nn.ModuleList; in a model without one, all), which leaves out the head. nn.Linear and
        transformers' Conv1D count as linear, if their weight is trained.
    seed: of the projections, which depend on nothing else but the layer's name, side and width.

    names: of the layers. size: numbers in the sketch of a row, layers x r². Raises ConfigError if there is no layer.
    """

    def __init__(self, model: nn.Module, rank: int, layers: str | Sequence[str] | None = None, seed: int = 0):
        self.rank = rank
        self._modules = _linear_layers(model, layers)
        self.names = tuple(self._modules)
        self.size = len(self.names) * rank * rank
        self.enabled = False
        self.zeros: list[Tensor] = []  # one a layer, for the pass that comes next
        self.running: list[Tensor] | None = None  # of the pass that is in its backward pass
        self._signs = [
            tuple(_signs(seed, name, side, width, rank) for side, width in zip("io", _widths(module), strict=True))
            for name, module in self._modules.items()
        ]
        self._handles = [
            module.register_forward_hook(self._hook(number)) for number, module in enumerate(self._modules.values())
        ]

    def device(self) -> torch.device:
        """Where the first layer's weight is."""
        return next(iter(self._modules.values())).weight.device  # type: ignore[return-value]

    def prepare(self, rows: int, device: torch.device) -> None:
        """New `zeros`, for a pass over so many rows; not made in the hooks, as torch.compile makes no leaves.

        They share their memory, which nothing writes to.
        """
        if self._signs[0][0].device != device:
            self._signs = [(p.to(device), q.to(device)) for p, q in self._signs]
        zero = torch.zeros(rows, self.rank, self.rank, device=device)
        self.zeros = [zero.detach().requires_grad_() for _ in self.names]

    def rows_of(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """float32 [rows, size]: the sketches of rows from what autograd gave for the zeros of a pass."""
        parts = []
        for name, gradient in zip(self.names, gradients, strict=True):
            if gradient is None:
                raise ConfigError(
                    f"layer {name} gave no sketch in a pass over {self.zeros[0].shape[0]} rows: it was not used, or "
                    "its input is not [rows, ..., features], row by row as in the batch; leave it out with `layers`"
                )
            parts.append(gradient.flatten(1))
        return torch.cat(parts, 1) / self.rank

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self.zeros, self.running = [], None

    def _hook(self, number: int) -> Any:
        def tap(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
            if not self.enabled or not torch.is_grad_enabled() or not output.requires_grad:
                return None
            zeros = self.zeros
            # The reentrant variant of activation checkpointing runs the forward pass that counts inside of backward.
            if not torch.compiler.is_compiling() and self.running and torch._C._current_graph_task_id() != -1:
                zeros = self.running
            # A pass over other rows (an evaluation with gradients, say) is none of ours.
            if inputs[0].ndim < 2 or inputs[0].shape[0] != zeros[number].shape[0]:
                return None
            return _Tap.apply(output, inputs[0], *self._signs[number], zeros[number])

        return tap


class Pass:
    """One forward pass, and whose its rows are."""

    def __init__(self, sketcher: Sketcher, ids: Tensor, divisor: Tensor | float | None, weights: Tensor | None):
        self._sketcher, self._zeros = sketcher, sketcher.zeros
        self._ids, self._divisor, self._weights = ids.detach(), divisor, weights
        for zero in self._zeros:
            zero.grad = None  # of a pass that was not counted
        self.scale: Tensor | None = None

    def begin(self, gradient: Tensor) -> None:
        """Hook of the loss: its backward pass begins, and says what the loss was multiplied with."""
        self.scale = gradient.detach()
        self._sketcher.running = self._zeros

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sketches [B, size] of the sums of token losses, domains [B] and units [B], 0 where a row has no gradient."""
        assert self.scale is not None
        sketches = self._sketcher.rows_of([zero.grad for zero in self._zeros])
        n = len(sketches)
        if self._ids.numel() % n or (self.scale.numel() != 1 and self.scale.numel() % n):
            raise ConfigError(
                f"the layers saw {n} rows, but the loss has domain_ids of shape {list(self._ids.shape)}; expected one "
                "for each row, or one for each token"
            )
        ids = self._ids.to(sketches.device).reshape(n, -1).long()
        ids = torch.where((ids == ids[:, :1]).all(1), ids[:, 0], -2)
        # Token losses with factors of their own (reduction "none"): the largest of the row, so that masks do no harm.
        scale = self.scale.expand(n) if self.scale.numel() == 1 else self.scale.reshape(n, -1).abs().amax(1)
        if self._weights is not None:
            scale = scale * self._weights[ids.clamp(0, len(self._weights) - 1)]
        if self._divisor is not None:
            scale = scale / self._divisor
        there = scale != 0
        return sketches / torch.where(there, scale, 1.0)[:, None], ids, there.float()


class _Tap(torch.autograd.Function):
    """The output as it is; in the backward pass, the sketches of its rows as the gradient of `zeros`."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, p: Tensor, q: Tensor, zeros: Tensor) -> Tensor:
        # Sums of scaled float16 gradients may overflow; those of bfloat16 are as good as its products.
        dtype = torch.float32 if output.dtype == torch.float16 else output.dtype
        with torch.autocast(output.device.type, enabled=False):
            ctx.save_for_backward(inputs.to(dtype) @ p.to(dtype), q)
        # Not a view, which autograd would not let an activation change in place. A linear layer saves no output.
        return output.data

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        projected, q = ctx.saved_tensors
        with torch.autocast(gradient.device.type, enabled=False):
            other = gradient.to(projected.dtype) @ q.to(projected.dtype)
            rows, rank = projected.shape[0], projected.shape[-1]
            sketch = torch.bmm(projected.reshape(rows, -1, rank).transpose(1, 2), other.reshape(rows, -1, rank))
        return gradient, None, None, None, sketch.float()


def _linear_layers(model: nn.Module, patterns: str | Sequence[str] | None) -> dict[str, nn.Module]:
    """The layers to take sketches of, by name; a layer that the model has under several names once."""
    blocks = {
        id(module)
        for part in model.modules()
        if isinstance(part, nn.ModuleList)
        for block in part
        for module in block.modules()
    }
    wanted = [patterns] if isinstance(patterns, str) else patterns
    linear = {name: module for name, module in model.named_modules() if _is_linear(module)}
    found = {
        name: module
        for name, module in linear.items()
        if (
            any(fnmatch.fnmatchcase(name, p) for p in wanted)
            if wanted is not None
            else not blocks or id(module) in blocks
        )
    }
    if not found:
        what = f"none that matches {wanted}" if wanted is not None and linear else "none"
        raise ConfigError(
            f"the model ({type(model).__name__}) has no linear layer to take gradients of: {what} among nn.Linear and "
            f"Conv1D with a weight that is trained; {len(linear)} are known, {', '.join([*linear][:4]) or 'nothing'}"
        )
    return found


def _is_linear(module: nn.Module) -> bool:
    # By name, so that transformers need not be there; FSDP makes subclasses.
    known = isinstance(module, nn.Linear) or any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)
    weight = getattr(module, "weight", None)
    return known and isinstance(weight, Tensor) and weight.requires_grad


def _widths(module: nn.Module) -> tuple[int, int]:
    """Features in and out."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0], weight.shape[1]


def _signs(seed: int, name: str, side: str, width: int, rank: int) -> Tensor:
    """bfloat16 [width, rank] of -1 and 1, which every dtype holds exactly, from a counter-based generator."""
    key = hashlib.sha256(f"{seed}/{plain_name(name)}/{side}".encode()).digest()
    words = np.random.Philox(key=np.frombuffer(key[:16], dtype=np.uint64)).random_raw(-(-width * rank // 64))
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: width * rank]
    return torch.from_numpy(bits.astype(np.float32).reshape(width, rank) * 2 - 1).to(torch.bfloat16)


def plain_name(name: str) -> str:
    """A module's name without those that wrappers (compile, DDP, checkpointing) put in between."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
