"""The loss and its statistics on every path, against torch in float64."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from mixloader import loss_path, loss_torch
from mixloader.errors import StatsError
from mixloader.loss import domain_cross_entropy
from mixloader.stats import DomainStats

# The interpreter computes in numpy, which warns where a GPU is silent.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

# Relative error of a gradient rounded once; the interpreter truncates to bfloat16 instead of rounding.
GRADIENT_ERROR = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float64: 1e-12}


def batch(n_classes, dtype=torch.float32, device="cpu", rows=4, tokens=5, seed=0):
    """Logits [rows, tokens, V] with gradient, targets with ignored ones, and a domain for each row."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, tokens, n_classes, generator=generator) * 4).to(dtype).to(device)
    targets = torch.randint(0, n_classes, (rows, tokens), generator=generator)
    targets[torch.rand(rows, tokens, generator=generator) < 0.2] = -100
    domain_ids = torch.randint(0, 3, (rows,), generator=generator)
    return logits.requires_grad_(), targets.to(device), domain_ids.to(device)


def reference(logits, targets, upstream=None, reduction="mean", ignore_index=-100):
    """Loss, token losses and gradient by torch in float64. Targets out of range count as ignored."""
    x = logits.detach().double().cpu().requires_grad_()
    y = targets.cpu().long().clone()
    y[(y < 0) | (y >= x.shape[-1]) | (y == ignore_index)] = -100
    flat = x.reshape(-1, x.shape[-1]), y.reshape(-1)
    token_losses = F.cross_entropy(*flat, reduction="none").view(y.shape)
    loss = token_losses if reduction == "none" else F.cross_entropy(*flat, reduction=reduction)
    (gradient,) = torch.autograd.grad(loss, x, torch.ones_like(loss) if upstream is None else upstream.cpu().double())
    return loss.detach(), token_losses.detach(), gradient


def close(found, expected, dtype):
    error = (found.double().cpu() - expected).norm() / expected.norm()
    return error <= GRADIENT_ERROR[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n_classes", [7, 257, 1000, 1024, 4099])
def test_agrees_with_float64(device, n_classes, dtype):
    logits, targets, domain_ids = batch(n_classes, dtype, device)
    targets[1, 1], targets[2, 2] = n_classes, -7
    stats = DomainStats(3, device)
    before = logits.detach().clone()
    loss = domain_cross_entropy(logits, targets, domain_ids, stats=stats)
    loss.backward()
    expected, token_losses, gradient = reference(logits, targets)

    assert torch.equal(logits, before)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert logits.grad.dtype == dtype
    assert close(logits.grad, gradient, dtype)
    sums = stats.buffer.cpu().numpy()
    valid = ((targets >= 0) & (targets < n_classes)).cpu().numpy()
    domains = np.broadcast_to(domain_ids.cpu().numpy()[:, None], valid.shape)[valid]
    token_losses = token_losses.numpy()[valid]
    assert np.array_equal(sums[:3, 0], np.bincount(domains, minlength=3))
    assert sums[:3, 1] / 2**24 == pytest.approx(np.bincount(domains, token_losses, 3), rel=1e-5)
    assert sums[:3, 2] / 2**16 == pytest.approx(np.bincount(domains, token_losses**2, 3), rel=1e-5)
    bad = np.bincount(domain_ids[1:3].cpu().numpy(), minlength=4)
    assert np.array_equal(sums[:, -1], bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_any_upstream_gradient(device, reduction, dtype):
    logits, targets, domain_ids = batch(257, dtype, device)
    loss = domain_cross_entropy(logits, targets, domain_ids, reduction=reduction)
    upstream = torch.linspace(-3, 1, loss.numel() + 1)[1:].flip(0).view(loss.shape).to(device) * 0.37
    loss.backward(upstream)
    expected, _, gradient = reference(logits, targets, upstream, reduction)
    assert loss.shape == expected.shape
    assert torch.allclose(loss.double().cpu(), expected, rtol=1e-5)
    # Saved in the forward pass and then scaled, a gradient is rounded twice.
    found, twice = logits.grad, 1 if reduction == "none" else 2
    assert (found.double().cpu() - gradient).norm() / gradient.norm() <= twice * GRADIENT_ERROR[dtype]


def test_token_gradients_are_rounded_once(device):
    """With reduction "none" bfloat16 gradients are those of float32, rounded; not rounded, scaled, rounded again."""
    logits, targets, domain_ids = batch(100, torch.bfloat16, device)
    upstream = torch.rand(targets.shape, generator=torch.Generator().manual_seed(1)).to(device)
    domain_cross_entropy(logits, targets, domain_ids, reduction="none").backward(upstream)
    _, _, gradient = reference(logits, targets, upstream, "none")
    # One unit in the last place where the interpreter truncates, half a unit (and a float32 rounding) elsewhere.
    ulp = 2.0 ** torch.floor(torch.log2(gradient.abs().clamp(min=1e-30))) / 2**7
    assert ((logits.grad.double().cpu() - gradient).abs() <= 1.001 * ulp).all()


def test_float16_gradients_survive_with_a_gradient_scaler(device):
    """1 / count * p underflows in float16; what is asked for is 65536 times that."""
    logits, targets, domain_ids = batch(1000, torch.float16, device, rows=4, tokens=16)
    (domain_cross_entropy(logits, targets, domain_ids) * 65536).backward()
    _, _, gradient = reference(logits, targets, torch.tensor(65536.0))
    assert close(logits.grad, gradient, torch.float16)
    unscaled = (gradient / 65536).half()
    assert ((unscaled == 0) & (logits.grad.cpu() != 0)).sum() > 100


def test_a_retained_graph_gives_the_same_gradient_again(device):
    logits, targets, domain_ids = batch(33, torch.float32, device)
    loss = domain_cross_entropy(logits, targets, domain_ids)
    (first,) = torch.autograd.grad(loss * 0, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss * 3, logits, retain_graph=True)
    (third,) = torch.autograd.grad(loss, logits)
    _, _, gradient = reference(logits, targets)
    assert not first.any()
    assert close(second, 3 * gradient, torch.float32)
    assert close(third, gradient, torch.float32)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, logits)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck_in_float64(reduction):
    logits, targets, domain_ids = batch(5, torch.float64, rows=3, tokens=3)
    targets[0, 0], targets[2, 1] = 5, -100
    assert torch.autograd.gradcheck(
        lambda x: domain_cross_entropy(x, targets, domain_ids, reduction=reduction), (logits,)
    )


def test_double_backward_is_refused(device):
    logits, targets, domain_ids = batch(5, torch.float32, device)
    loss = domain_cross_entropy(logits, targets, domain_ids)
    (gradient,) = torch.autograd.grad(loss * loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        gradient.sum().backward()


N = 12


@pytest.fixture(scope="module")
def pool():
    """Tokens whose sums are to be the same however they arrive: NaN, ignored, out of range and id -1 among them."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(N, 64, generator=generator) * 5  # rows of whole 16 bytes, see kernels/row.py
    logits[5, 3] = torch.nan
    targets = torch.randint(0, 64, (N,), generator=generator)
    targets[7], targets[8] = -100, 64
    domain_ids = torch.tensor([0, 1, 0, 1, 0, 1, -1, 1, 0, 2, -1, 0])
    return logits, targets, domain_ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_are_bitwise_the_same_in_any_order_and_any_split(device, dtype, pool, request):
    def add(order, cuts):
        stats = DomainStats(2, device)
        logits, targets, domain_ids = (tensor[torch.tensor(order)].to(device) for tensor in pool)
        for start, stop in zip([0, *cuts], [*cuts, N], strict=True):
            part = slice(start, stop)
            domain_cross_entropy(logits[part].to(dtype), targets[part], domain_ids[part], stats=stats)
        return stats.buffer

    expected = add(range(N), [])
    assert expected[:, 0].tolist() == [4, 2, 0]
    assert expected[:, -1].tolist() == [1, 1, 1]

    # Cuts may coincide: an empty micro-batch adds nothing.
    @settings(max_examples=10 if "triton" in request.node.name else 50)
    @given(st.permutations(range(N)), st.lists(st.integers(0, N), max_size=3))
    def check(order, cuts):
        assert torch.equal(add(order, sorted(cuts)), expected)

    check()


def test_sums_do_not_depend_on_chunks_or_threads(monkeypatch):
    monkeypatch.setattr(loss_path, "path_of", lambda logits: loss_torch)
    logits, targets, domain_ids = batch(300, rows=8, tokens=32)
    buffers = []
    threads = torch.get_num_threads()
    for chunk, n in ((1, 1), (7 * 300, 2), (1 << 19, 1)):
        monkeypatch.setattr(loss_torch, "_CHUNK", chunk)
        torch.set_num_threads(n)
        stats = DomainStats(3)
        domain_cross_entropy(logits, targets, domain_ids, stats=stats)
        buffers.append(stats.buffer)
    torch.set_num_threads(threads)
    assert torch.equal(buffers[0], buffers[1])
    assert torch.equal(buffers[0], buffers[2])


def test_a_domain_for_each_row_is_a_domain_for_each_of_its_tokens(device):
    logits, targets, domain_ids = batch(17, torch.float32, device)
    by_row, by_token, flat = DomainStats(3, device), DomainStats(3, device), DomainStats(3, device)
    wide = domain_ids[:, None].expand(targets.shape)
    domain_cross_entropy(logits, targets, domain_ids, stats=by_row)
    domain_cross_entropy(logits, targets, wide.int(), stats=by_token)
    domain_cross_entropy(logits.view(-1, 17), targets.view(-1).int(), wide.reshape(-1), stats=flat)
    assert by_row.buffer[:, 0].sum() == (targets >= 0).sum()
    assert torch.equal(by_row.buffer, by_token.buffer)
    assert torch.equal(by_row.buffer, flat.buffer)


def test_the_loss_does_not_depend_on_domains(device):
    logits, targets, domain_ids = batch(17, torch.float32, device)
    stats = DomainStats(3, device)
    plain = domain_cross_entropy(logits, targets, None)
    domain_ids[0], domain_ids[1] = -1, 3
    counted = domain_cross_entropy(logits, targets, domain_ids, stats=stats)
    assert torch.equal(plain, counted)
    counted.backward()
    assert close(logits.grad, reference(logits, targets)[2], torch.float32)
    with pytest.raises(StatsError, match=rf"{(targets[1] >= 0).sum()} in no domain"):
        stats.snapshot().wait()


def test_logits_of_any_strides(device):
    padded, targets, _ = batch(40, torch.float32, device)
    targets.clamp_(max=36)
    by_class = padded[0].detach().t().contiguous().t()
    for logits, y in ((padded[..., :37], targets), (padded[:, ::2, 1:38], targets[:, ::2]), (by_class, targets[0])):
        x = logits.detach().requires_grad_()  # keeps the strides
        assert not x.is_contiguous()
        loss = domain_cross_entropy(x, y, None)
        loss.backward()
        expected, _, gradient = reference(x, y)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert close(x.grad, gradient, torch.float32)
        (per_token,) = torch.autograd.grad(domain_cross_entropy(x, y, None, reduction="none").sum(), x)
        assert close(per_token, gradient * (y >= 0).sum().cpu(), torch.float32)


def test_autocast_changes_nothing(device):
    logits, targets, _ = batch(17, torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        loss = domain_cross_entropy(logits, targets, None)
    assert torch.equal(loss, domain_cross_entropy(logits, targets, None))


def test_logits_far_from_zero_lose_no_accuracy(device):
    logits, targets, domain_ids = batch(50, torch.float32, device)
    # Multiples of 1/64 stay exact when 8192 is added, so the loss must not change.
    logits = (logits.detach() * 64).round() / 64
    for reduction in ("mean", "none"):
        x, far = logits.clone().requires_grad_(), (logits + 8192).requires_grad_()
        near_loss = domain_cross_entropy(x, targets, domain_ids, reduction=reduction)
        far_loss = domain_cross_entropy(far, targets, domain_ids, reduction=reduction)
        assert torch.allclose(near_loss, far_loss, rtol=1e-6, atol=1e-6)
        near_loss.sum().backward()
        far_loss.sum().backward()
        assert torch.allclose(x.grad, far.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignored", [False, True], ids=["empty", "all ignored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_without_a_valid_target_the_loss_is_that_of_torch(device, reduction, ignored, dtype):
    logits = torch.zeros(4 if ignored else 0, 3, dtype=dtype, device=device, requires_grad=True)
    targets = torch.full((len(logits),), -100, device=device)
    stats = DomainStats(1, device)
    loss = domain_cross_entropy(logits, targets, targets, stats=stats, reduction=reduction)
    expected = F.cross_entropy(logits.detach().float(), targets, reduction=reduction)
    assert torch.equal(loss.nan_to_num(-1.0), expected.nan_to_num(-1.0))
    loss.sum().backward()
    assert logits.grad.shape == logits.shape
    assert not logits.grad.any()
    assert not stats.buffer.any()


def test_nan_and_infinite_losses_reach_the_caller_and_count_as_bad(device):
    logits, _, _ = batch(9, torch.float32, device, rows=1, tokens=4)
    logits = logits.detach()[0]
    logits[0, 4], logits[1, 4], logits[2, 4] = torch.nan, torch.inf, -torch.inf
    targets = torch.tensor([1, 1, 4, 1], device=device)
    stats = DomainStats(4, device)
    found = domain_cross_entropy(logits, targets, torch.arange(4, device=device), stats=stats, reduction="none")
    expected = F.cross_entropy(logits.double(), targets, reduction="none")
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isposinf(), expected.isposinf())
    assert stats.buffer[:, -1].tolist() == [1, 1, 1, 0, 0]
    assert stats.buffer[:, 0].tolist() == [0, 0, 0, 1, 0]
    assert stats.buffer[:3, 1:3].count_nonzero() == 0
    assert domain_cross_entropy(logits, targets, None).isnan()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rows_that_are_not_valid_have_no_gradient_even_if_their_logits_are_nan(device, reduction):
    logits, targets, domain_ids = batch(9, torch.float32, device)
    targets[0, 0], targets[0, 1] = -100, 9
    with torch.no_grad():
        logits[0, :2] = torch.nan
    loss = domain_cross_entropy(logits, targets, domain_ids, reduction=reduction)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert not logits.grad[0, :2].any()
    assert logits.grad.isfinite().all()


def test_an_ignore_index_that_is_a_class(device):
    logits, targets, domain_ids = batch(9, torch.float32, device)
    targets.clamp_(min=0)
    stats = DomainStats(3, device)
    loss = domain_cross_entropy(logits, targets, domain_ids, stats=stats, ignore_index=0)
    assert loss.item() == pytest.approx(reference(logits, targets, ignore_index=0)[0].item(), rel=1e-5)
    assert stats.buffer[:, 0].sum() == (targets != 0).sum()


def test_only_training_counts(device):
    logits, targets, domain_ids = batch(9, torch.float32, device)
    stats = DomainStats(3, device)
    losses = [domain_cross_entropy(logits, targets, None)]
    with torch.no_grad():
        losses.append(domain_cross_entropy(logits, targets, domain_ids, stats=stats))
    with torch.inference_mode():
        losses.append(domain_cross_entropy(logits.detach(), targets, domain_ids, stats=stats))
    with stats.paused():
        losses.append(domain_cross_entropy(logits, targets, domain_ids, stats=stats))
    assert not stats.buffer.any()
    assert [loss.item() for loss in losses] == [losses[0].item()] * 4
    assert [loss.requires_grad for loss in losses] == [True, False, False, True]


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_activation_checkpointing_counts_once(device, use_reentrant, reduction):
    logits, targets, domain_ids = batch(9, torch.float32, device)
    once, stats = DomainStats(3, device), DomainStats(3, device)
    domain_cross_entropy(logits, targets, domain_ids, stats=once)

    def head(x, stats=None):
        # What follows the loss saves a tensor, which keeps the recomputation from stopping before the loss.
        loss = domain_cross_entropy(2 * x, targets, domain_ids, stats=stats, reduction=reduction)
        return loss.sum().square()

    checkpoint(head, logits * 0.5, stats, use_reentrant=use_reentrant).backward()
    assert torch.equal(stats.buffer, once.buffer)
    (gradient,) = torch.autograd.grad(head(logits * 0.5), logits)
    assert torch.equal(logits.grad, gradient)


@pytest.mark.parametrize("triton", [True, False])
def test_logits_take_the_path_of_their_device_and_dtype(monkeypatch, triton):
    def path(device, dtype):
        logits = SimpleNamespace(is_cuda=device == "cuda", is_cpu=device == "cpu", dtype=dtype)
        return loss_path.path_of(logits).__name__.removeprefix("mixloader.")

    pytest.importorskip("triton")
    monkeypatch.setattr(loss_path, "_has_triton", lambda: triton)
    assert path("cuda", torch.bfloat16) == ("kernels.cross_entropy" if triton else "loss_torch")
    assert path("cuda", torch.float64) == "loss_torch"
    assert path("cpu", torch.bfloat16) == "loss_cpu"
    assert path("cpu", torch.float64) == "loss_torch"
    assert path("xpu", torch.float32) == "loss_torch"


ZEROS = torch.zeros(2, 3, 5)
LONG = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((ZEROS.long(), LONG, None), {}, TypeError, "logits are int64; expected float32 or bfloat16"),
        ((ZEROS.numpy(), LONG, None), {}, TypeError, "logits is a ndarray; expected a tensor"),
        ((ZEROS, LONG.float(), None), {}, TypeError, "targets are float32; expected int64 or int32"),
        ((ZEROS, LONG[:, :2], None), {}, ValueError, r"targets have shape \[2, 2\]; expected \[2, 3\]"),
        ((ZEROS[0, 0], LONG[0, 0], None), {}, ValueError, r"logits have shape \[5\]; expected \[N, V\]"),
        ((ZEROS[..., :0], LONG, None), {}, ValueError, "at least one class"),
        ((ZEROS, LONG.to("meta"), None), {}, ValueError, "targets are on meta but the logits are on cpu"),
        ((ZEROS, LONG, None), {"reduction": "avg"}, ValueError, "reduction is 'avg'; expected one of mean, sum, none"),
        ((ZEROS, LONG, None), {"ignore_index": None}, TypeError, "ignore_index is None; expected an integer"),
        ((ZEROS, LONG, None), {"stats": DomainStats(2)}, ValueError, "stats are given but domain_ids is None"),
        ((ZEROS, LONG, LONG), {"stats": 3}, TypeError, "stats is a int; expected a DomainStats"),
        ((ZEROS, LONG, LONG), {"stats": DomainStats(2, "meta")}, ValueError, "stats are on meta"),
        ((ZEROS, LONG, LONG.bool()), {}, TypeError, "domain_ids are bool; expected int64 or int32"),
        ((ZEROS, LONG, LONG[0]), {}, ValueError, r"domain_ids have shape \[3\]; expected \[2, 3\].*or \[2\]"),
        ((ZEROS, LONG, LONG.to("meta")), {}, ValueError, "domain_ids are on meta"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(arguments, options, error, message):
    with pytest.raises(error, match=message):
        domain_cross_entropy(*arguments, **options)
