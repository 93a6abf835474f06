"""Every option of the loss on every path, in a pairwise covering array, against autograd in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from covering import pairwise
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import FACTORS, GRADIENT_ERROR, B, Case, T, name_of

from mixloader import loss_path
from mixloader.errors import StatsError
from mixloader.loss import DomainCrossEntropy, domain_cross_entropy
from mixloader.stats import DomainStats

# The interpreter computes in numpy, which warns where a GPU is silent.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

FACTORS = {**FACTORS, "layout": ["plain", "padded", "transposed", "unaligned"], "in_place": [False, True]}
CASES = pairwise(FACTORS)


def laid_out(logits, layout):
    """The same logits [B, T, V] in other memory."""
    n_classes = logits.shape[-1]
    if layout == "padded":
        return F.pad(logits, (0, 16 - n_classes % 16), value=float("nan"))[..., :n_classes]
    if layout == "transposed":
        return logits.transpose(0, 2).contiguous().transpose(0, 2)
    if layout == "unaligned":
        return F.pad(logits.reshape(-1), (1, 0))[1:].view(logits.shape)
    return logits.clone()


def test_the_cases_cover_every_pair_of_options():
    for (a, levels_a), (b, levels_b) in itertools.combinations(FACTORS.items(), 2):
        assert {(case[a], case[b]) for case in CASES} == set(itertools.product(levels_a, levels_b))
    assert len(CASES) < 50


def check(options, device):
    case = Case(options, device)
    logits = torch.randn(B, T, options["n_classes"], generator=torch.Generator().manual_seed(1)) * 4
    logits = laid_out(logits.to(options["dtype"]), options["layout"]).to(device).requires_grad_()
    before = logits.detach().clone()
    x = before.cpu().double().requires_grad_()
    expected, table, bad = case.expected(x)
    (gradient,) = torch.autograd.grad(expected, x, case.upstream(expected))
    loss = case.loss(domain_cross_entropy, logits, in_place=options["in_place"])
    assert loss.shape == expected.shape
    assert torch.allclose(loss.double().cpu(), expected, rtol=1e-5, atol=1e-6)
    (found,) = torch.autograd.grad(loss, logits, case.upstream(loss))
    assert found.dtype == options["dtype"]
    # Saved in the forward pass and then scaled, a gradient is rounded twice.
    error = (found.double().cpu() - gradient).norm() / gradient.norm()
    assert error <= 2 * GRADIENT_ERROR[options["dtype"]]
    if not options["in_place"]:
        assert torch.equal(logits, before)
    case.check_sums(table, bad)


@pytest.mark.parametrize("options", CASES, ids=name_of)
def test_options_agree_with_float64(device, options):
    check(options, device)


@pytest.mark.parametrize("options", [case for case in CASES if case["n_classes"] > 1000], ids=name_of)
def test_options_agree_with_float64_where_a_row_has_many_blocks(monkeypatch, options):
    pytest.importorskip("triton", reason="triton is not installed (pip install 'mixloader[triton]')")
    from mixloader.kernels import cross_entropy

    monkeypatch.setattr(loss_path, "path_of", lambda logits: cross_entropy)
    monkeypatch.setattr(cross_entropy, "MAX_BLOCK", 512)
    check(options, "cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_in_place_needs_no_second_tensor(device, dtype, reduction):
    logits = torch.randn(4, 33, generator=torch.Generator().manual_seed(0)).to(dtype).to(device).requires_grad_()
    targets = torch.arange(4, device=device)
    apart = domain_cross_entropy(logits, targets, reduction=reduction)
    (expected,) = torch.autograd.grad(apart.sum(), logits)
    again = logits.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(
        domain_cross_entropy(again, targets, reduction=reduction, in_place=True).sum(), again
    )
    assert found.data_ptr() == again.data_ptr()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_gradient_in_place_is_not_silent_for_others_who_need_the_logits(device, reduction):
    logits = torch.randn(4, 9).to(device).requires_grad_()
    rows = logits * 1.0
    loss = (
        rows.square().sum()
        + domain_cross_entropy(rows, torch.arange(4, device=device), reduction=reduction, in_place=True).sum()
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_overlapping_rows_are_not_overwritten(device):
    row = torch.randn(9).to(device).requires_grad_()
    targets = torch.arange(4, device=device)
    loss = domain_cross_entropy(row.expand(4, 9), targets, in_place=True)
    (found,) = torch.autograd.grad(loss, row)
    (expected,) = torch.autograd.grad(F.cross_entropy(row.expand(4, 9), targets), row)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_one_row_whose_classes_are_apart_is_not_overwritten(device):
    logits = torch.randn(9, 3).to(device).t()[:1].requires_grad_()
    target = torch.tensor([2], device=device)
    (found,) = torch.autograd.grad(domain_cross_entropy(logits, target, in_place=True), logits)
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, target), logits)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_a_denominator_of_all_micro_batches_gives_the_gradient_of_the_whole_batch(device):
    logits = torch.randn(12, 33, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    targets = torch.arange(12, device=device)
    targets[3:7] = -100
    (whole,) = torch.autograd.grad(domain_cross_entropy(logits, targets), logits)
    n_items = (targets != -100).sum()
    for part in (slice(0, 3), slice(3, 7), slice(7, 12)):
        domain_cross_entropy(logits[part], targets[part], denominator=n_items).backward()
    assert torch.allclose(logits.grad, whole, rtol=1e-5, atol=1e-8)


def test_label_smoothing_is_that_of_torch():
    logits, targets = torch.randn(6, 11, dtype=torch.float64), torch.tensor([0, 3, -100, 10, 2, 2])
    for smoothing in (0.0, 0.3, 1.0):
        expected = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        assert domain_cross_entropy(logits, targets, label_smoothing=smoothing).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck_in_float64_with_every_option(reduction, softcap):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 2, 5, dtype=torch.float64, generator=generator).requires_grad_()
    targets = torch.tensor([[0, 4], [-100, 2], [5, 1]])
    weights, by_domain = torch.rand(3, 2, generator=generator), torch.rand(2, generator=generator)

    def loss(x):
        options = {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": softcap, "reduction": reduction}
        return domain_cross_entropy(
            x, targets, torch.tensor([0, 1, -1]), token_weights=weights, domain_weights=by_domain, **options
        )

    assert torch.autograd.gradcheck(loss, (logits,))


@pytest.fixture(scope="module")
def pool():
    generator = torch.Generator().manual_seed(5)
    n = 12
    logits = torch.randn(n, 64, generator=generator) * 5  # rows of whole 16 bytes, see kernels/row.py
    logits[5, 3] = torch.nan
    targets = torch.randint(0, 64, (n,), generator=generator)
    targets[7], targets[8] = -100, 64
    targets[:3] = logits[:3].argmax(1)
    return logits, targets, torch.arange(n) % 4, torch.rand(n, generator=generator) * 8, torch.arange(64) % 7


def test_every_statistic_is_bitwise_the_same_in_any_order_and_split_and_adds_up_over_domains(device, pool, request):
    token_bytes = pool[-1]

    def add(order, cuts, merge):
        stats = DomainStats(4, device, distribution=True, token_bytes=token_bytes)
        logits, targets, ids, references = (tensor[torch.tensor(order)].to(device) for tensor in pool[:-1])
        ids = ids // merge
        for start, stop in zip([0, *cuts], [*cuts, len(order)], strict=True):
            part = slice(start, stop)
            domain_cross_entropy(
                logits[part], targets[part], ids[part], stats=stats, softcap=30.0, reference_losses=references[part]
            )
        return stats.buffer.cpu()

    expected = add(range(12), [], 1)
    assert (expected[:4, 1:-1] > 0).any(0).all()

    @settings(max_examples=8 if "triton" in request.node.name else 40)
    @given(st.permutations(range(12)), st.lists(st.integers(0, 12), max_size=3), st.sampled_from([1, 2, 4]))
    def check(order, cuts, merge):
        merged = expected[:4].view(-1, merge, expected.shape[1]).sum(1)
        found = add(order, sorted(cuts), merge)
        assert torch.equal(found[: len(merged)], merged)
        assert not found[len(merged) :].any()

    check()


def test_the_losses_of_bad_and_confident_tokens(device):
    logits = torch.tensor([[0.0, 0.0, 40.0], [0.0, 0.0, 0.0], [0.0, 7.0, 7.0], [1.0, 2.0, 3.0]]).to(device)
    targets = torch.tensor([2, 1, 1, 0], device=device)
    stats = DomainStats(4, device, distribution=True)
    logits.requires_grad_()
    domain_cross_entropy(logits, targets, torch.arange(4, device=device), stats=stats)
    table = stats.snapshot().wait()
    assert table.column("correct").tolist() == [1, 1, 1, 0]  # equal to the largest is right
    assert table.column("entropy") == pytest.approx([0.0, np.log(3), 0.6974, 0.8324], abs=1e-3)
    p = torch.softmax(logits.detach().double().cpu(), 1)
    exact = (p - F.one_hot(targets.cpu(), 3)).norm(dim=1).tolist()
    assert table.column("el2n") == pytest.approx(exact, abs=2e-4)


def test_masked_classes_change_no_statistic(device):
    """A logit of -inf is a class that cannot be: as if it were not there."""
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(2))
    masked = F.pad(logits, (0, 30), value=-torch.inf)
    targets = torch.tensor([1, 2, 3], device=device)
    sums = []
    for x in (logits.to(device), masked.to(device)):
        stats = DomainStats(3, device, distribution=True)
        domain_cross_entropy(x, targets, targets - 1, stats=stats, z_loss=1e-3)
        sums.append(stats.buffer.cpu().double())
    assert torch.allclose(sums[0], sums[1], rtol=1e-6, atol=16)


@pytest.mark.parametrize("what", ["token_weights", "reference_losses", "z_loss"])
def test_what_makes_a_loss_infinite_is_counted_as_bad(device, what):
    logits, targets = torch.zeros(2, 5, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    options = {what: torch.tensor([1.0, torch.inf], device=device)}
    if what == "z_loss":
        logits[1], options = 1e30, {"z_loss": 1e-3}
    stats = DomainStats(2, device)
    domain_cross_entropy(logits, targets, torch.arange(2, device=device), stats=stats, **options)
    assert stats.buffer[:, 0].tolist() == [1, 0, 0]
    with pytest.raises(StatsError, match="1 in domain 1"):
        stats.snapshot().wait()


def test_a_document_out_of_range_is_a_bad_token(device):
    logits, targets = torch.zeros(2, 3, 5, device=device), torch.ones(2, 3, dtype=torch.int64, device=device)
    documents = torch.tensor([[0, 1, 2], [0, -1, 1]], device=device)
    stats = DomainStats(2, device)
    ids = torch.tensor([[0, 1], [1, -1]], device=device)
    domain_cross_entropy(logits, targets, ids, document_ids=documents, stats=stats)
    assert stats.buffer[:, 0].tolist() == [1, 2, 0]
    assert stats.buffer[:, -1].tolist() == [0, 0, 2]


def test_the_module_keeps_options_and_holds_no_state(device):
    logits, targets = torch.randn(4, 9).to(device), torch.arange(4, device=device)
    stats, weights = DomainStats(2, device), torch.tensor([0.5, 2.0], device=device)
    module = DomainCrossEntropy(stats, softcap=5.0, label_smoothing=0.1, reduction="sum", domain_weights=weights)
    ids = targets % 2
    options = {"softcap": 5.0, "label_smoothing": 0.1, "reduction": "sum", "domain_weights": weights}
    expected = domain_cross_entropy(logits, targets, ids, token_weights=targets.float(), **options)
    assert torch.equal(module(logits, targets, ids, token_weights=targets.float()), expected)
    assert stats.buffer[:, 0].tolist() == [2, 2, 0]
    assert not module.state_dict()
    assert "softcap=5.0" in repr(module)
    with pytest.raises(TypeError, match="no option 'smoothing'; expected one of ignore_index"):
        DomainCrossEntropy(smoothing=0.1)
