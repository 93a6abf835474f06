"""The loss from hidden states on both paths, against torch in float64: every option, exact sums, memory, bad input."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from covering import pairwise
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import FACTORS, GRADIENT_ERROR, B, Case, T, name_of

from mixloader import DomainStats, domain_cross_entropy
from mixloader.errors import PlacementError
from mixloader.linear_chunks import chunk_rows, logits_row_bytes
from mixloader.linear_loss import (
    LinearDomainCrossEntropy,
    default_chunk_bytes,
    linear_domain_cross_entropy,
)

# The interpreter computes in numpy, which warns where a GPU is silent.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

H = 12
FACTORS = {
    **FACTORS,
    "bias": [False, True],
    "chunk_rows": [1, 4, 15],
    "frozen": [None, "hidden", "head"],
    "layout": ["plain", "padded vocabulary", "transposed"],
    "autocast": [False, True],
}
CASES = pairwise(FACTORS)


def head_of(n_classes, dtype, device="cpu", layout="plain", rows=B, tokens=T, seed=0):
    """Hidden states, weight and bias whose logits, multiples of 1/4 below 16, are exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randint(-2, 3, (rows, tokens, H), generator=generator) / 2
    weight = torch.randint(-2, 3, (n_classes, H), generator=generator) / 2
    bias = torch.randint(-3, 4, (n_classes,), generator=generator) / 4
    if layout == "padded vocabulary":
        weight = F.pad(weight, (0, 0, 0, 9), value=float("nan"))[:n_classes]
    elif layout == "transposed":
        hidden, weight = hidden.transpose(0, 2).contiguous().transpose(0, 2), weight.t().contiguous().t()
    # `to` keeps the strides of what is not a copy already.
    return tuple(tensor.to(dtype).to(device).requires_grad_() for tensor in (hidden, weight, bias))


def chunk_bytes(n_rows, n_classes, dtype):
    """For so many rows, which are padded to multiples of 64 classes."""
    return n_rows * (-(-n_classes // 64) * 64) * dtype.itemsize


def test_the_cases_cover_every_pair_of_options():
    for (a, levels_a), (b, levels_b) in itertools.combinations(FACTORS.items(), 2):
        assert {(case[a], case[b]) for case in CASES} == set(itertools.product(levels_a, levels_b))
    assert len(CASES) < 50


@pytest.mark.parametrize("options", CASES, ids=name_of)
def test_options_agree_with_float64(device, options):
    case = Case(options, device)
    dtype, n_classes = options["dtype"], options["n_classes"]
    hidden, weight, bias = head_of(n_classes, dtype, device, options["layout"])
    leaves = [hidden, weight, bias] if options["bias"] else [hidden, weight]
    exact = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    expected, table, bad = case.expected(F.linear(*exact))
    wanted = {"hidden": slice(1, None), "head": slice(0, 1), None: slice(None)}[options["frozen"]]
    gradients = torch.autograd.grad(expected, exact[wanted], case.upstream(expected))
    for leaf in leaves:
        leaf.requires_grad_(any(leaf is other for other in leaves[wanted]))

    of_logits = torch.bfloat16 if options["autocast"] else dtype
    with torch.autocast(device, torch.bfloat16, enabled=options["autocast"]):
        loss = case.loss(
            linear_domain_cross_entropy,
            hidden,
            weight,
            bias=bias if options["bias"] else None,
            chunk_bytes=chunk_bytes(options["chunk_rows"], n_classes, of_logits),
        )
    assert loss.dtype == torch.float32
    assert loss.shape == expected.shape
    assert torch.allclose(loss.double().cpu(), expected, rtol=1e-5, atol=1e-6)
    found = torch.autograd.grad(loss, leaves[wanted], case.upstream(loss))
    tolerance = max(GRADIENT_ERROR[of_logits], GRADIENT_ERROR[dtype])
    for gradient, approximate, leaf in zip(gradients, found, leaves[wanted], strict=True):
        assert approximate.dtype == dtype
        assert approximate.shape == leaf.shape
        # Rounded as the logits' gradient, as the product, and when scaled.
        assert (approximate.double().cpu() - gradient).norm() <= 3 * tolerance * gradient.norm()
    case.check_sums(table, bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("n_classes", [7, 257, 1000, 1024, 4099])
def test_is_linear_and_cross_entropy(device, n_classes, dtype):
    """Of logits that are not exact, within what their dtype rounds."""
    if dtype == torch.float64 and device == "cuda":
        pytest.skip("covered on the CPU")
    generator = torch.Generator().manual_seed(n_classes)
    hidden = torch.randn(21, 32, generator=generator).to(dtype).to(device).requires_grad_()
    weight = (torch.randn(n_classes, 32, generator=generator) / 4).to(dtype).to(device).requires_grad_()
    targets = torch.randint(0, n_classes, (21,), generator=generator)
    targets[::6] = -100
    loss = linear_domain_cross_entropy(hidden, weight, targets.to(device), chunk_bytes=chunk_bytes(8, n_classes, dtype))
    (loss * 0.3).backward()
    x, w = (leaf.detach().cpu().double().requires_grad_() for leaf in (hidden, weight))
    expected = F.cross_entropy(F.linear(x, w), targets)
    (expected * 0.3).backward()
    unit = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    assert loss.item() == pytest.approx(expected.item(), rel=16 * unit)
    assert (hidden.grad.double().cpu() - x.grad).norm() <= 8 * unit * x.grad.norm()
    assert (weight.grad.double().cpu() - w.grad).norm() <= 8 * unit * w.grad.norm()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck_in_float64(reduction):
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 2, 4), (5, 4), (5,)
    hidden, weight, bias = (torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes)
    targets = torch.tensor([[0, 4], [-100, 2], [5, 1]])
    numbers = torch.rand(3, 2, generator=generator)
    options = {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 3.0, "token_weights": numbers, "reduction": reduction}

    def loss(hidden, weight, bias):
        return linear_domain_cross_entropy(
            hidden,
            weight,
            targets,
            torch.tensor([0, 1, -1]),
            bias=bias,
            domain_weights=numbers[0],
            chunk_bytes=1,
            **options,
        )

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


def test_the_domain_of_a_batch_of_one_row_is_that_of_all_its_tokens(device):
    hidden, weight, _ = head_of(9, torch.float32, device, rows=1, tokens=70)
    targets, stats = torch.zeros(1, 70, dtype=torch.int64, device=device), DomainStats(3, device)
    linear_domain_cross_entropy(hidden, weight, targets, targets[:, 0] + 2, stats=stats)
    assert stats.buffer[:, 0].tolist() == [0, 0, 70, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_losses_and_sums_are_bitwise_the_same_in_chunks_of_any_size_and_from_whole_logits(
    device, dtype, reduction, request
):
    n_classes = 64
    hidden, weight, bias = head_of(n_classes, dtype, device)
    generator = torch.Generator().manual_seed(7)
    targets = torch.randint(0, n_classes, (B, T), generator=generator)
    targets[0, 1], targets[1, 2] = -100, n_classes
    ids = torch.randint(-1, 3, (B, T), generator=generator)
    ids[2, 2] = 3  # out of range
    targets, ids, references = targets.to(device), ids.to(device), torch.rand(B, T, generator=generator).to(device)
    options = {"reduction": reduction, "reference_losses": references, "softcap": 9.0}
    whole = DomainStats(3, device, distribution=True, token_bytes=range(n_classes))
    expected = domain_cross_entropy(F.linear(hidden, weight, bias), targets, ids, stats=whole, **options)
    assert whole.buffer[:, -1].sum() == 2

    @settings(max_examples=4 if "triton" in request.node.name else 25)
    @given(st.integers(1, 2 * B * T))
    def check(n_rows):
        stats = DomainStats(3, device, distribution=True, token_bytes=range(n_classes))
        bytes_of_chunk = chunk_bytes(n_rows, n_classes, dtype)
        loss = linear_domain_cross_entropy(
            hidden, weight, targets, ids, bias=bias, stats=stats, chunk_bytes=bytes_of_chunk, **options
        )
        assert torch.equal(stats.buffer, whole.buffer)
        assert torch.equal(loss, expected)

    check()


def test_the_gradient_of_the_weight_is_added_up_in_float32_over_many_chunks(device):
    """In bfloat16, 256 plus 0.5 is 256, however often."""
    hidden = torch.ones(9, 1, dtype=torch.bfloat16, device=device)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, device=device, requires_grad=True)
    bias = torch.zeros(2, dtype=torch.bfloat16, device=device, requires_grad=True)
    targets, token_weights = torch.zeros(9, dtype=torch.int64, device=device), torch.ones(9, device=device)
    token_weights[0] = 512
    options = {"token_weights": token_weights, "reduction": "sum", "chunk_bytes": 1}
    linear_domain_cross_entropy(hidden, weight, targets, bias=bias, **options).backward()
    assert weight.grad.flatten().tolist() == [-260.0, 260.0]
    assert bias.grad.tolist() == [-260.0, 260.0]


def test_float16_gradients_survive_with_a_gradient_scaler(device):
    """1 / count * p of unlikely classes underflows in float16; what is asked for is 65536 times that."""
    hidden, weight, bias = head_of(100, torch.float16, device)
    with torch.no_grad():
        bias[50:] = -17.0
    targets = torch.zeros(B, T, dtype=torch.int64)
    (linear_domain_cross_entropy(hidden, weight, targets.to(device), bias=bias) * 65536).backward()
    x, w, b = (leaf.detach().cpu().double().requires_grad_() for leaf in (hidden, weight, bias))
    (F.cross_entropy(F.linear(x, w, b).flatten(0, 1), targets.flatten()) * 65536).backward()
    for gradient, exact in ((weight.grad[50:], w.grad[50:]), (weight.grad, w.grad), (hidden.grad, x.grad)):
        assert (gradient.double().cpu() - exact).norm() <= 2**-8 * exact.norm()
    assert ((w.grad / 65536).half() == 0).sum() > 100


def test_micro_batches_with_one_denominator_give_the_gradient_of_the_whole_batch(device):
    hidden, weight, _ = head_of(33, torch.float32, device)
    targets = torch.arange(B * T, device=device).view(B, T)
    targets[1, :3] = -100
    whole = torch.autograd.grad(linear_domain_cross_entropy(hidden, weight, targets), (hidden, weight))
    n_items = (targets != -100).sum()
    for row in range(B):
        part = slice(row, row + 1)
        linear_domain_cross_entropy(hidden[part], weight, targets[part], denominator=n_items).backward()
    assert torch.allclose(hidden.grad, whole[0], rtol=1e-5, atol=1e-8)
    assert torch.allclose(weight.grad, whole[1], rtol=1e-5, atol=1e-8)


def test_a_head_tied_to_the_embedding_gets_both_gradients(device):
    embedding = torch.randn(33, 8, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    tokens = torch.arange(12, device=device).view(3, 4)
    linear_domain_cross_entropy(torch.tanh(embedding[tokens]), embedding, tokens + 1, chunk_bytes=1).backward()
    again = embedding.detach().clone().requires_grad_()
    logits = F.linear(torch.tanh(again[tokens]), again)
    F.cross_entropy(logits.view(-1, 33), tokens.view(-1) + 1).backward()
    assert torch.allclose(embedding.grad, again.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignored", [False, True], ids=["empty", "all ignored"])
def test_without_a_valid_target_the_loss_is_that_of_torch(device, reduction, ignored, dtype):
    hidden = torch.ones(5 if ignored else 0, 4, dtype=dtype, device=device, requires_grad=True)
    weight = torch.ones(3, 4, dtype=dtype, device=device, requires_grad=True)
    bias = torch.ones(3, dtype=dtype, device=device, requires_grad=True)
    targets = torch.full((len(hidden),), -100, device=device)
    stats = DomainStats(1, device)
    loss = linear_domain_cross_entropy(
        hidden, weight, targets, targets, bias=bias, stats=stats, reduction=reduction, chunk_bytes=1
    )
    expected = F.cross_entropy(torch.zeros(len(hidden), 3, device=device), targets, reduction=reduction)
    assert torch.equal(loss.nan_to_num(-1.0), expected.nan_to_num(-1.0))
    loss.sum().backward()
    for leaf in (hidden, weight, bias):
        assert leaf.grad.shape == leaf.shape
        assert not leaf.grad.any()
    assert not stats.buffer.any()


def test_bad_targets_and_nan_logits_are_those_of_domain_cross_entropy(device):
    hidden, weight, _ = head_of(9, torch.float32, device, rows=1, tokens=4)
    with torch.no_grad():
        hidden[0, 2, 0] = torch.nan
    targets = torch.tensor([[1, 9, 2, -3]], device=device)
    stats = DomainStats(2, device), DomainStats(2, device)
    ids = torch.tensor([1], device=device)
    losses = linear_domain_cross_entropy(hidden, weight, targets, ids, stats=stats[0], reduction="none", chunk_bytes=1)
    expected = domain_cross_entropy(F.linear(hidden, weight), targets, ids, stats=stats[1], reduction="none")
    assert losses[0].isnan().tolist() == [False, False, True, False]
    assert torch.equal(losses.nan_to_num(-1), expected.nan_to_num(-1))
    assert stats[0].buffer[:, -1].tolist() == [0, 3, 0]
    assert torch.equal(stats[0].buffer, stats[1].buffer)
    (gradient,) = torch.autograd.grad(losses[0, [0, 1, 3]].sum(), hidden)
    assert gradient[0, 0].any()
    assert not gradient[0, [1, 3]].any()


def test_only_training_counts(device):
    hidden, weight, _ = head_of(9, torch.float32, device)
    targets = torch.zeros(B, T, dtype=torch.int64, device=device)
    stats = DomainStats(1, device)
    losses = [linear_domain_cross_entropy(hidden, weight, targets)]
    with torch.no_grad():
        losses.append(linear_domain_cross_entropy(hidden, weight, targets, targets, stats=stats))
    with stats.paused():
        losses.append(linear_domain_cross_entropy(hidden, weight, targets, targets, stats=stats))
    assert not stats.buffer.any()
    assert len({loss.item() for loss in losses}) == 1
    assert [loss.requires_grad for loss in losses] == [True, False, True]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_retained_graph_gives_the_same_gradients_again(device, reduction):
    hidden, weight, _ = head_of(9, torch.float32, device)
    targets = torch.zeros(B, T, dtype=torch.int64, device=device)
    loss = linear_domain_cross_entropy(hidden, weight, targets, reduction=reduction).sum()
    first = torch.autograd.grad(loss * 2, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss * 2, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, hidden)


def test_chunks_fit_the_bytes_and_are_of_nearly_the_same_size():
    for n, row_bytes, bytes_of_chunk in itertools.product((0, 1, 127, 2048, 5000), (1, 100), (1, 1000, 51_200, 10**9)):
        rows = chunk_rows(n, row_bytes, bytes_of_chunk)
        assert rows >= 1
        assert rows == 1 or rows * row_bytes <= bytes_of_chunk
        assert rows <= max(n, 1)
    assert chunk_rows(2048, 1, 2047) == 1024
    assert chunk_rows(5000, 100, 51_200 * 3) == 1280  # a multiple of 128 in place of 1250


@pytest.mark.parametrize("n_classes", [7, 8192, 50_257, 128_256, 1_000_003])
def test_a_large_vocabulary_does_not_make_chunks_of_few_rows(n_classes):
    default = default_chunk_bytes(n_classes, 4, "cpu")
    assert chunk_rows(100_000, logits_row_bytes(n_classes, 4), default) >= 128
    assert default <= max(1 << 24, 128 * 4 * (n_classes + 63))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_memory_for_logits_is_that_of_a_chunk(dtype, reduction):
    """Of 2,048 x 4,099 logits, allocated at any one time beside the results: 1 MB, and the scratch of the path."""
    hidden, weight, _ = head_of(4099, dtype, rows=8, tokens=256)
    targets = torch.zeros(8, 256, dtype=torch.int64)
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_domain_cross_entropy(hidden, weight, targets, reduction=reduction, chunk_bytes=1 << 20).sum().backward()
    held = highest = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    results = sum(leaf.numel() * 4 for leaf in (hidden, weight)) * 2
    logits = 8 * 256 * 4099 * dtype.itemsize
    assert highest > 1 << 20
    assert highest - results < 6 << 20 < logits / 2


def test_the_module_keeps_options_and_holds_no_state(device):
    hidden, weight, bias = head_of(9, torch.float32, device)
    targets = torch.arange(B * T, device=device).view(B, T) % 9
    stats, by_domain = DomainStats(2, device), torch.tensor([0.5, 2.0], device=device)
    options = {"softcap": 5.0, "reduction": "sum", "domain_weights": by_domain, "chunk_bytes": 1 << 10}
    module = LinearDomainCrossEntropy(stats, **options)
    given = {"bias": bias, "token_weights": targets.float()}
    expected = linear_domain_cross_entropy(hidden, weight, targets, targets % 2, **options, **given)
    assert torch.equal(module(hidden, weight, targets, targets % 2, **given), expected)
    assert stats.buffer[:, 0].sum() == B * T
    assert not module.state_dict()
    assert not list(module.parameters())
    assert "chunk_bytes=1024" in repr(module)
    with pytest.raises(TypeError, match="LinearDomainCrossEntropy has no option 'in_place'; expected one of ignore_"):
        LinearDomainCrossEntropy(in_place=True)


HIDDEN, WEIGHT, TARGETS = torch.zeros(2, 3, 5), torch.zeros(7, 5), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((HIDDEN.long(), WEIGHT, TARGETS), {}, TypeError, "hidden states are int64; expected float32 or"),
        ((HIDDEN, WEIGHT.long(), TARGETS), {}, TypeError, "weights of the head are int64"),
        ((HIDDEN, WEIGHT.half(), TARGETS), {}, TypeError, "are float16, float32; expected one dtype, or autocast"),
        ((HIDDEN, WEIGHT, TARGETS), {"bias": torch.zeros(7).half()}, TypeError, "are float16, float32"),
        ((HIDDEN, WEIGHT, TARGETS), {"bias": torch.zeros(6)}, ValueError, r"biases .* shape \[6\]; expected \[7\]"),
        ((HIDDEN, WEIGHT, TARGETS), {"bias": 3}, TypeError, "biases of the head is a int; expected a tensor"),
        ((HIDDEN[0, 0], WEIGHT, TARGETS[0, 0]), {}, ValueError, r"hidden states have shape \[5\]; expected \[N, H\]"),
        ((HIDDEN, WEIGHT.t(), TARGETS), {}, ValueError, r"weights of the head have shape \[5, 7\]; expected \[V, 5\]"),
        ((HIDDEN, WEIGHT[:0], TARGETS), {}, ValueError, r"shape \[0, 5\]; expected \[V, 5\], one row"),
        ((HIDDEN, WEIGHT.to("meta"), TARGETS), {}, ValueError, "weights of the head are on meta"),
        ((HIDDEN, WEIGHT, TARGETS[:1]), {}, ValueError, r"targets have shape \[1, 3\]; expected \[2, 3\]"),
        ((HIDDEN, WEIGHT, TARGETS.to("meta")), {}, ValueError, "targets are on meta but the logits are on cpu"),
        ((HIDDEN, WEIGHT, TARGETS), {"chunk_bytes": 0}, ValueError, "chunk_bytes is 0; expected a whole number"),
        ((HIDDEN, WEIGHT, TARGETS), {"chunk_bytes": 0.5}, ValueError, "chunk_bytes is 0.5"),
        ((HIDDEN, WEIGHT, TARGETS), {"reduction": "avg"}, ValueError, "reduction is 'avg'"),
        ((HIDDEN, WEIGHT, TARGETS), {"stats": DomainStats(2)}, ValueError, "stats are given but domain_ids is None"),
        (
            (HIDDEN, WEIGHT, TARGETS, TARGETS),
            {"stats": DomainStats(2, token_bytes=[1] * 6)},
            ValueError,
            "token_bytes of stats has 6 entries for 7 classes",
        ),
    ],
)
def test_bad_input_is_refused_in_a_sentence(arguments, options, error, message):
    with pytest.raises(error, match=message):
        linear_domain_cross_entropy(*arguments, **options)


def test_a_head_spread_over_devices_is_refused():
    dist = pytest.importorskip("torch.distributed")
    tensor = pytest.importorskip("torch.distributed.tensor")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        weight = tensor.distribute_tensor(WEIGHT, mesh, [tensor.Shard(0)])
        with pytest.raises(PlacementError, match=r"weights of the head are a DTensor .*Shard\(dim=0\).*full_tensor"):
            linear_domain_cross_entropy(HIDDEN, weight, TARGETS)
        with pytest.raises(PlacementError, match="hidden states are a DTensor"):
            linear_domain_cross_entropy(tensor.distribute_tensor(HIDDEN, mesh, [tensor.Shard(0)]), WEIGHT, TARGETS)
    finally:
        dist.destroy_process_group()
