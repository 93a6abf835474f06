"""The Triton kernels against the torch path: in Triton's interpreter without a GPU, on it with one."""

from __future__ import annotations

import pytest
import torch

from mixloader import loss_torch
from mixloader.loss import domain_cross_entropy
from mixloader.loss_path import LossInputs, LossOptions
from mixloader.stats import DomainStats

pytest.importorskip("triton", reason="triton is not installed (pip install 'mixloader[triton]')")
from mixloader.kernels import cross_entropy as kernels
from mixloader.kernels import rescale as rescaling

# The interpreter computes in numpy, which warns where a GPU is silent.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")


def tokens(n, n_classes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n)
    logits = (torch.randn(n, n_classes, generator=generator) * 4).to(dtype).to(DEVICE)
    targets = torch.randint(-1, n_classes + 1, (n,), generator=generator)
    targets[1] = -100
    domain_ids = torch.randint(-2, 4, (n,), generator=generator)
    return logits, targets.to(DEVICE), domain_ids.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n_classes", [7, 257, 1000, 1024, 4099])
def test_both_paths_agree(n_classes, dtype):
    logits, targets, domain_ids = tokens(13, n_classes, dtype)
    sums, results = [], []
    for path in (kernels, loss_torch):
        stats = DomainStats(3, DEVICE)
        scale = torch.full((1,), 0.3, device=DEVICE)
        losses, _, gradient = path.forward(
            LossInputs(logits, targets, domain_ids), LossOptions(), stats.buffer, scale, None
        )
        sums.append(stats.buffer.cpu())
        results.append((losses, gradient.double()))
    assert torch.equal(sums[0][:, [0, -1]], sums[1][:, [0, -1]])
    assert torch.allclose(sums[0].double(), sums[1].double(), rtol=1e-6)
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-6, atol=1e-6)
    # One unit in the last place of the smaller type.
    ulp = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    assert torch.allclose(results[0][1], results[1][1], rtol=ulp, atol=1e-7)


def test_sums_are_those_of_the_torch_path_unit_for_unit():
    """Given the same token losses, both paths add the same integers."""
    logits, targets, domain_ids = tokens(64, 19)
    targets[3:] = 3
    domain_ids[3:] = torch.arange(61) % 3
    logits[20:, 3] += 10  # losses so small that they are not whole units
    logits[3] *= 1e4  # a loss above the clamp
    logits[4, 0] = torch.nan
    stats, again = DomainStats(3, DEVICE), DomainStats(3, DEVICE)
    losses, _, _ = kernels.forward(LossInputs(logits, targets, domain_ids), LossOptions(), stats.buffer, None, None)
    valid = (targets >= 0) & (targets < 19)
    again.add(losses, domain_ids, valid, targets == -100)
    assert losses[3] > 1024
    assert ((losses > 0) & (losses < 0.01)).sum() >= 10
    assert torch.equal(stats.buffer, again.buffer)


@pytest.mark.parametrize("n_classes", [16, 17, 8192, 8193, 32768, 40000])
def test_rows_of_one_block_and_of_several(n_classes):
    logits, targets, _ = tokens(3, n_classes)
    targets = torch.tensor([0, n_classes - 1, n_classes // 2], device=DEVICE)
    scale = torch.ones(1, device=DEVICE)
    losses, _, gradient = kernels.forward(LossInputs(logits, targets), LossOptions(), None, scale, None)
    x = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(x, targets, reduction="none")
    expected.sum().backward()
    assert torch.allclose(losses.double(), expected, rtol=1e-5)
    assert torch.allclose(gradient.double(), x.grad, rtol=1e-5, atol=1e-9)


def test_masked_classes_have_probability_zero_even_if_they_fill_a_block(monkeypatch):
    monkeypatch.setattr(kernels, "MAX_BLOCK", 128)
    logits, _, _ = tokens(3, 300)
    logits[0, :290], logits[1, :290], logits[2, 10:] = -torch.inf, torch.finfo(torch.float32).min, -torch.inf
    targets = torch.tensor([295, 295, 5], device=DEVICE)
    losses, _, gradient = kernels.forward(
        LossInputs(logits, targets), LossOptions(), None, torch.ones(1, device=DEVICE), None
    )
    x = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(x, targets, reduction="none")
    expected.sum().backward()
    assert torch.allclose(losses.double(), expected, rtol=1e-5)
    assert torch.allclose(gradient.double(), x.grad, rtol=1e-5, atol=1e-9)


def test_the_gradient_of_the_backward_pass_is_that_of_the_forward_pass():
    logits, targets, _ = tokens(9, 1000)
    scale = torch.full((1,), 0.7, device=DEVICE)
    _, saved, fused = kernels.forward(LossInputs(logits, targets), LossOptions(), None, scale, None)
    for factor in (scale, scale.expand(9).contiguous()):
        gradient = kernels.backward(LossInputs(logits, targets), LossOptions(), saved, factor, None)
        assert torch.equal(gradient, fused)


def test_offsets_beyond_32_bits():
    """Rows of one tensor more than 2^31 elements apart. Only the pages of the three rows are ever touched."""
    stride = (1 << 30) + 16
    far = torch.empty(2 * stride + 16, dtype=torch.bfloat16, device=DEVICE).as_strided((3, 16), (stride, 1))
    near = torch.arange(48.0, device=DEVICE).view(3, 16).remainder(7).to(torch.bfloat16)
    far.copy_(near)
    targets = torch.tensor([1, 2, 3], device=DEVICE)
    expected, _, _ = kernels.forward(LossInputs(near, targets), LossOptions(), None, None, None)
    losses, _, _ = kernels.forward(LossInputs(far, targets), LossOptions(), None, None, None)
    assert torch.equal(losses, expected)


@pytest.mark.parametrize("n", [0, 1, 4096, 5000])
def test_valid_count(n):
    targets = torch.arange(n, device=DEVICE) % 11 - 1
    count, inverse = kernels.valid_count(targets, 9, 4, torch.float32).tolist()
    # Of -1 to 9, -1 and 9 are out of range and 4 is ignored.
    expected = sum(target not in (-1, 4, 9) for target in targets.tolist())
    assert count == expected
    assert inverse == pytest.approx(1 / max(expected, 1))


@pytest.mark.parametrize("factor", [1.0, 0.0, -2.5])
def test_rescale_reaches_every_element(monkeypatch, factor):
    monkeypatch.setattr(rescaling, "PROGRAMS", 2)
    x = torch.arange(1.0, 5 * rescaling.BLOCK + 3, device=DEVICE).view(1, -1)
    expected = x * factor
    found = kernels.rescale(x, torch.tensor(factor, device=DEVICE))
    assert found.data_ptr() == x.data_ptr()
    assert torch.equal(found, expected)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("everything", [False, True])
def test_training_on_cuda_never_waits_for_the_device(dtype, reduction, everything):
    logits, targets, domain_ids = tokens(512, 50257, dtype)
    logits.requires_grad_()
    stats = DomainStats(4, DEVICE, distribution=everything, token_bytes=torch.ones(50257, dtype=torch.int32))
    upstream = torch.full((512,) if reduction == "none" else (), 0.5, device=DEVICE)
    options = {}
    if everything:
        numbers = torch.rand(512, device=DEVICE)
        options = {"label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0, "domain_weights": numbers[:4]}
        options |= {"token_weights": numbers, "reference_losses": numbers, "in_place": True}
        options |= {"document_ids": torch.arange(512, device=DEVICE) // 64}
        domain_ids = torch.arange(8, device=DEVICE) % 4
    if everything and reduction == "mean":
        options["denominator"] = torch.tensor(512, device=DEVICE)

    def step():
        loss = domain_cross_entropy(logits * 1.0, targets, domain_ids, stats=stats, reduction=reduction, **options)
        loss.backward(upstream)
        return stats.snapshot()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
