"""Combinations of the options that both losses take, and what they must give: autograd in float64, written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mixloader.stats import STATISTICS, DomainStats, StatsTable

B, T, D = 3, 5, 4
FACTORS = {
    "n_classes": [7, 257, 1000, 1024, 4099],
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "reduction": ["mean", "sum", "none"],
    "denominator": [None, "tensor", "number"],
    "upstream": [1.0, -0.37],
    "label_smoothing": [0.0, 0.1],
    "z_loss": [0.0, 1e-2],
    "softcap": [None, 5.0],
    "domain_weights": [False, True],
    "token_weights": [False, True],
    "ids": ["row", "token", "document", "document of row"],
    "statistics": [None, "losses", "all"],
    "reference_losses": [False, True],
    "ignore_index": [-100, 3],
}
# Relative error of a gradient rounded once; the interpreter truncates to bfloat16 instead of rounding.
GRADIENT_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


class Case:
    """What a loss is given beside its logits in one combination of options; the same for the same combination."""

    def __init__(self, options, device, seed=1):
        self.options, self.device = options, device
        generator = torch.Generator().manual_seed(seed)
        n_classes = options["n_classes"]
        self.targets = torch.randint(0, n_classes, (B, T), generator=generator)
        self.targets[torch.rand(B, T, generator=generator) < 0.2] = options["ignore_index"]
        self.targets[0, 2], self.targets[1, 1], self.targets[2, 3] = 3, n_classes, -7
        self.tokens = torch.randint(-1, D, (B, T), generator=generator)
        self.documents = torch.randint(0, 3, (B, T), generator=generator)
        self.domain_ids, self.document_ids = self.tokens, None
        if options["ids"] == "row":
            self.domain_ids = self.tokens[:, 0].int()
            self.tokens = self.domain_ids.long()[:, None].expand(B, T)
        elif options["ids"] == "document":
            self.domain_ids, self.document_ids = torch.tensor([2, -1, 0]), self.documents.int()
            self.tokens = self.domain_ids[self.documents]
        elif options["ids"] == "document of row":
            self.domain_ids, self.document_ids = self.tokens[:, :3], self.documents
            self.tokens = self.domain_ids.gather(1, self.documents)
        self.domain_weights = torch.rand(D, generator=generator) * 2 if options["domain_weights"] else None
        self.token_weights = torch.rand(B, T, generator=generator) * 2 if options["token_weights"] else None
        with_references = options["reference_losses"] and options["statistics"]
        self.references = torch.rand(B, T, generator=generator) * 8 if with_references else None
        self.token_bytes = torch.randint(0, 9, (n_classes,), generator=generator)
        self.stats = None
        if options["statistics"]:
            every = options["statistics"] == "all"
            self.stats = DomainStats(D, device, distribution=every, token_bytes=self.token_bytes if every else None)
        self.denominator = 11.5 if options["reduction"] == "mean" and options["denominator"] else None

    def loss(self, function, *tensors, **more):
        """Of domain_cross_entropy(logits, ...) or linear_domain_cross_entropy(hidden, weight, ...)."""
        options, denominator = self.options, self.denominator
        if denominator is not None and options["denominator"] == "tensor":
            denominator = torch.tensor(denominator, device=self.device)
        return function(
            *tensors,
            self.targets.to(self.device),
            self.domain_ids.to(self.device),
            document_ids=self.on_device(self.document_ids),
            stats=self.stats,
            reference_losses=self.on_device(self.references),
            domain_weights=self.on_device(self.domain_weights),
            token_weights=self.on_device(self.token_weights),
            denominator=denominator,
            **{name: options[name] for name in ("ignore_index", "label_smoothing", "z_loss", "softcap", "reduction")},
            **more,
        )

    def on_device(self, tensor):
        return None if tensor is None else tensor.to(self.device)

    def expected(self, logits):
        """Loss, differentiable by float64 logits, float64 [D, columns] of statistics, and bad tokens [D + 1]."""
        options = self.options
        x = logits if options["softcap"] is None else options["softcap"] * torch.tanh(logits / options["softcap"])
        n_classes, targets = options["n_classes"], self.targets
        valid = (targets >= 0) & (targets < n_classes) & (targets != options["ignore_index"])
        y = targets.where(valid, 0)
        lse = torch.logsumexp(x, -1)
        nll = lse - x.gather(-1, y[..., None])[..., 0]
        smoothing = options["label_smoothing"]
        losses = (1 - smoothing) * nll + smoothing * (lse - x.mean(-1)) + options["z_loss"] * lse**2
        if self.token_weights is not None:
            losses = losses * self.token_weights.double()
        if self.domain_weights is not None:
            losses = losses * torch.where(self.tokens >= 0, self.domain_weights.double()[self.tokens], 1.0)
        losses = torch.where(valid, losses, 0.0)
        if options["reduction"] == "none":
            loss = losses
        elif options["reduction"] == "sum":
            loss = losses.sum()
        else:
            loss = losses.sum() / (self.denominator or valid.sum())
        p = torch.softmax(x.detach(), -1)
        columns = {
            "tokens": torch.ones(B, T),
            "loss": nll.detach(),
            "loss_sq": nll.detach() ** 2,
            "excess": torch.zeros(B, T) if self.references is None else (nll.detach() - self.references).clamp(min=0),
            "entropy": torch.special.entr(p).sum(-1),
            "correct": (x.gather(-1, y[..., None])[..., 0] >= x.amax(-1)).double(),
            "el2n": (p - F.one_hot(y, n_classes)).norm(dim=-1),
            "bytes": self.token_bytes[y].double(),
        }
        if options["statistics"] != "all":
            columns |= {name: torch.zeros(B, T) for name in ("entropy", "correct", "el2n", "bytes")}
        counted = (valid & (self.tokens >= 0)).flatten()
        ids = self.tokens.flatten()[counted].numpy()
        table = np.stack([np.bincount(ids, v.flatten()[counted].numpy(), D) for v in columns.values()], axis=1)
        bad = ~valid & (targets != options["ignore_index"])
        return loss, table, np.bincount(self.tokens[bad].numpy() % (D + 1), minlength=D + 1)

    def upstream(self, loss):
        """Varies from token to token where there is a loss for each."""
        scale = self.options["upstream"]
        return torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype, device=loss.device).view(loss.shape) * scale

    def check_sums(self, table, bad):
        """That what was added to `stats` is what `expected` says."""
        if self.stats is None:
            return
        sums = StatsTable(self.stats.buffer.cpu().numpy())
        for column, name in enumerate(list(STATISTICS)[:-1]):
            tolerance = {"rel": 1e-5, "abs": 2e-4 * B * T if name == "el2n" else 1e-4}
            assert sums.column(name) == pytest.approx(table[:, column], **tolerance), name
        assert np.array_equal(sums.sums[:, -1], bad)


def name_of(case):
    return "-".join(str(level).removeprefix("torch.") for level in case.values())
