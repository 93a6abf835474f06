"""What the loss refuses, before any work: options, shapes and placements that cannot be meant."""

from __future__ import annotations

import pytest
import torch

from mixloader.errors import MixLoaderError, PlacementError
from mixloader.loss import domain_cross_entropy
from mixloader.stats import DomainStats

ZEROS = torch.zeros(2, 3, 5)
LONG = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing is 1.5; expected a number from 0 to 1"),
        ({"z_loss": -1.0}, ValueError, "z_loss is -1.0; expected a number of at least 0"),
        ({"z_loss": float("nan")}, ValueError, "z_loss is nan"),
        ({"softcap": 0.0}, ValueError, "softcap is 0.0; expected a number above 0, or None"),
        ({"denominator": 3, "reduction": "sum"}, ValueError, "denominator is given with reduction 'sum'"),
        ({"denominator": torch.ones(2)}, ValueError, r"denominator has shape \[2\]; expected one number"),
        ({"denominator": torch.ones(1, device="meta")}, ValueError, "denominator are on meta"),
        ({"token_weights": torch.ones(2)}, ValueError, r"token_weights have shape \[2\]; expected \[2, 3\]"),
        ({"token_weights": LONG}, TypeError, "token_weights are int64; expected float32"),
        ({"token_weights": torch.ones(2, 3, requires_grad=True)}, ValueError, r"pass token_weights.detach\(\)"),
        ({"domain_weights": torch.ones(2)}, ValueError, "domain_weights are given but domain_ids is None"),
        ({"domain_weights": LONG[0], "domain_ids": LONG}, TypeError, "domain_weights are int64"),
        ({"domain_weights": ZEROS[0], "domain_ids": LONG}, ValueError, r"expected \[D\], one for each domain"),
        (
            {"domain_weights": torch.ones(2), "domain_ids": LONG, "stats": DomainStats(3)},
            ValueError,
            "2 domain_weights are given for 3 domains",
        ),
        ({"reference_losses": torch.ones(2, 3)}, ValueError, "reference_losses are given but stats is None"),
        (
            {"reference_losses": torch.ones(3), "domain_ids": LONG, "stats": DomainStats(3)},
            ValueError,
            r"reference_losses have shape \[3\]; expected \[2, 3\]",
        ),
        ({"document_ids": LONG}, ValueError, "document_ids are given but domain_ids is None"),
        (
            {"document_ids": LONG[0], "domain_ids": LONG},
            ValueError,
            r"document_ids have shape \[3\]; expected \[2, 3\]",
        ),
        ({"document_ids": LONG, "domain_ids": LONG[:, :0]}, ValueError, r"shape \[2, 0\]; with document_ids expected"),
        (
            {"document_ids": LONG, "domain_ids": LONG[:1]},
            ValueError,
            r"expected \[K\], one for each document, or \[2, K\]",
        ),
        ({"document_ids": LONG.float(), "domain_ids": LONG}, TypeError, "document_ids are float32"),
        (
            {"domain_ids": LONG, "stats": DomainStats(3, token_bytes=[1, 2])},
            ValueError,
            "token_bytes of stats has 2 entries for 5 classes",
        ),
    ],
)
def test_bad_options_are_refused_in_a_sentence(options, error, message):
    with pytest.raises(error, match=message):
        domain_cross_entropy(ZEROS, LONG, **options)


def test_logits_spread_over_devices_are_refused():
    dist = pytest.importorskip("torch.distributed")
    tensor = pytest.importorskip("torch.distributed.tensor")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        logits = tensor.distribute_tensor(ZEROS, mesh, [tensor.Shard(2)])
        with pytest.raises(PlacementError, match=r"logits are a DTensor with placements .*Shard\(dim=2\).*full_tensor"):
            domain_cross_entropy(logits, LONG)
        with pytest.raises(MixLoaderError, match="targets are a DTensor"):
            domain_cross_entropy(ZEROS, tensor.distribute_tensor(LONG, mesh, [tensor.Replicate()]))
    finally:
        dist.destroy_process_group()
