"""The heads of transformers' models, made to return the loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mixloader.linear_loss import linear_domain_cross_entropy

FUSED = frozenset(
    f"{family}ForCausalLM" for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Olmo2", "Phi3", "Gemma", "GPTNeoX")
) | {"GPT2LMHeadModel"}
"""Models whose logits are those of their head, an nn.Linear, and nothing else."""


class FusedHead:
    """A head that returns the loss in place of the logits, which are then never whole.

    In the model's own forward pass, where DDP and FSDP see that the weight is used and have it whole.
    """

    def __init__(self, head: nn.Linear):
        self._head = head

    @contextmanager
    def returning(self, targets: Tensor, domain_ids: Tensor, options: Mapping[str, Any]) -> Iterator[None]:
        head = self._head

        def forward(hidden: Tensor) -> Tensor:
            return linear_domain_cross_entropy(hidden, head.weight, targets, domain_ids, bias=head.bias, **options)

        vars(head)["forward"] = forward
        try:
            yield
        finally:
            del vars(head)["forward"]


def fused_head(model: Any) -> FusedHead | None:
    """The head of a model in FUSED, if nothing has been put on it (an adapter, a hook, an offload); else None."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings() if type(base).__name__ in FUSED else None
    if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head):
        return None
    return FusedHead(head)
