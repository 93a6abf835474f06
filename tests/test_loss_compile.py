"""The loss as torch operators: torch.compile, fake tensors, checkpointing of compiled code, CUDA graphs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mixloader.loss import DomainCrossEntropy, domain_cross_entropy
from mixloader.loss_path import LossInputs, LossOptions, loss_dtype
from mixloader.stats import DomainStats

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch about itself, when it compiles
]


def batch(rows=4, tokens=6, n_classes=33, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows * tokens)
    logits = (torch.randn(rows, tokens, n_classes, generator=generator) * 3).to(dtype)
    targets = torch.randint(0, n_classes, (rows, tokens), generator=generator)
    targets[0, 0] = -100
    return logits.requires_grad_(), targets, torch.arange(rows) % 3


OPTIONS = {
    "plain": {},
    "none": {"reduction": "none"},
    "in place": {"in_place": True},
    "everything": {
        "label_smoothing": 0.1,
        "z_loss": 1e-3,
        "softcap": 15.0,
        "domain_weights": torch.tensor([0.5, 1.0, 2.0]),
        "token_weights": torch.linspace(0, 2, 24).view(4, 6),
        "reference_losses": torch.linspace(0, 8, 24).view(4, 6),
        "denominator": torch.tensor(20),
    },
    "documents": {"document_ids": (torch.arange(24) % 3).view(4, 6)},
}


@pytest.mark.parametrize(("backend", "name"), [("inductor", "everything"), *(("aot_eager", name) for name in OPTIONS)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_code_is_one_graph_and_gives_the_same(backend, name, dtype):
    options = OPTIONS[name]
    logits, targets, domain_ids = batch(dtype=dtype)
    if name == "documents":
        domain_ids = torch.tensor([[0, 1, 2]] * 4)

    def step(logits, targets, domain_ids, stats):
        loss = domain_cross_entropy(logits * 1.5, targets, domain_ids, stats=stats, **options)
        return (loss * torch.linspace(-1, 2, loss.numel()).view(loss.shape)).sum() * 0.7

    stats = [DomainStats(3, distribution=True, token_bytes=range(33)) for _ in range(2)]
    expected = step(logits, targets, domain_ids, stats[0])
    (gradient,) = torch.autograd.grad(expected, logits)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    found = compiled(logits, targets, domain_ids, stats[1])
    (found_gradient,) = torch.autograd.grad(found, logits)
    assert torch.allclose(found, expected, rtol=1e-5)
    # The same gradient, rounded once more or less often on its way to the leaf.
    tolerance = 1e-5 if dtype == torch.float32 else 2.0**-6
    assert torch.allclose(found_gradient.float(), gradient.float(), rtol=tolerance, atol=1e-6)
    assert stats[1].buffer[:, 0].sum() == 23
    assert torch.allclose(stats[0].buffer.double(), stats[1].buffer.double(), rtol=1e-6)
    # A second call does not compile again, and adds.
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(logits, targets, domain_ids, stats[1])
    assert stats[1].buffer[:, 0].sum() == 46


def test_compiled_code_knows_when_not_to_count():
    logits, targets, domain_ids = batch()
    stats = DomainStats(3)
    compiled = torch.compile(DomainCrossEntropy(stats), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(logits, targets, domain_ids)
    with stats.paused():
        compiled(logits, targets, domain_ids)
    assert not stats.buffer.any()
    compiled(logits, targets, domain_ids)
    assert stats.buffer[:, 0].sum() == 23


@pytest.mark.parametrize("outside", [True, False], ids=["checkpoint of compiled code", "compiled checkpoint"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_recomputation_of_compiled_code_does_not_count(outside, backend):
    logits, targets, domain_ids = batch()
    stats = DomainStats(3)

    def head(x):
        # What follows the loss saves a tensor, which keeps the recomputation from stopping before the loss.
        return domain_cross_entropy(x * 2, targets, domain_ids, stats=stats, reduction="none").square().sum()

    def whole(x):
        return checkpoint(head, x, use_reentrant=False)

    if outside:
        head = torch.compile(head, fullgraph=True, backend=backend)
    else:
        whole = torch.compile(whole, fullgraph=True, backend=backend)
    whole(logits).backward()
    assert stats.buffer[:, 0].sum() == 23
    (expected,) = torch.autograd.grad(
        domain_cross_entropy(logits * 2, targets, None, reduction="none").square().sum(), logits
    )
    assert torch.allclose(logits.grad, expected, rtol=1e-5, atol=1e-6)


def test_one_graph_for_batches_of_all_sizes():
    def step(logits, targets, domain_ids, stats):
        return domain_cross_entropy(logits, targets, domain_ids, stats=stats)

    stats = DomainStats(3)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows, tokens in ((4, 6), (5, 7), (3, 8), (9, 2)):
        logits, targets, domain_ids = batch(rows, tokens)
        found = compiled(logits, targets, domain_ids, stats)
        assert torch.allclose(found, domain_cross_entropy(logits, targets))
    assert stats.buffer[:, 0].sum() == 24 + 35 + 24 + 18 - 4


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_operators_are_what_torch_expects_of_one(device, dtype, padded):
    if dtype == torch.float64 and device == "cuda":
        pytest.skip("float64 takes the torch path")
    logits = torch.randn(6, 40).to(dtype).to(device)[:, : 37 if padded else 40].detach()
    targets = torch.tensor([0, 3, -100, 36, 2, 2], device=device)
    ids, weights = targets % 2, torch.rand(6, device=device).to(loss_dtype(logits))
    arguments = (*LossInputs(logits, targets, ids, weights), *LossOptions(softcap=9.0, z_loss=0.1))
    sums = DomainStats(2, device).buffer
    saved = torch.ops.mixloader.token_losses(*arguments, None, False)[1]
    if dtype == torch.float64 and saved.dtype != dtype:
        pytest.skip("the kernel computes in float32")
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    logits.requires_grad_()
    torch.library.opcheck(torch.ops.mixloader.token_losses.default, (*arguments, sums, False), test_utils=checks)
    with torch.no_grad():
        scale = torch.ones(1, dtype=saved.dtype, device=device)
        gradient_arguments = (*arguments, saved, scale)
        torch.library.opcheck(torch.ops.mixloader.token_gradient.default, gradient_arguments, test_utils=checks[::2])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_refused_even_if_only_the_gradient_is_used(device, reduction):
    logits, targets, _ = batch()
    logits = logits.detach().to(device).requires_grad_()
    loss = domain_cross_entropy(logits, targets.to(device), None, reduction=reduction).sum()
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated again.*Use torch.nn.functional.cross_entropy"):
        gradient.square().sum().backward()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")
@pytest.mark.parametrize("wrap", ["DDP", "FSDP"])
def test_a_model_that_is_spread_over_ranks_trains_with_it(wrap):
    """One rank, where both must give the gradients of the bare model; the statistics stay out of the wrappers."""
    dist = pytest.importorskip("torch.distributed")
    torch.manual_seed(0)
    bare, spread = torch.nn.Linear(8, 33), torch.nn.Linear(8, 33)
    spread.load_state_dict(bare.state_dict())
    x, (_, targets, domain_ids) = torch.randn(4, 6, 8), batch()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        if wrap == "DDP":
            wrapped = torch.nn.parallel.DistributedDataParallel(spread)
        else:
            from torch.distributed.fsdp import fully_shard

            wrapped = fully_shard(spread, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        stats = [DomainStats(3), DomainStats(3)]
        for model, counted in zip((bare, wrapped), stats, strict=True):
            domain_cross_entropy(model(x), targets, domain_ids, stats=counted).backward()
        gradient = spread.weight.grad
        found = gradient if wrap == "DDP" else gradient.full_tensor()
        assert torch.allclose(found, bare.weight.grad, rtol=1e-5, atol=1e-8)
        assert torch.equal(stats[0].buffer, stats[1].buffer)
    finally:
        dist.destroy_process_group()


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from mixloader import DomainStats, domain_cross_entropy
stats = DomainStats(1)
logits = torch.zeros(2, 4, requires_grad=True)
domain_cross_entropy(logits, torch.tensor([1, 2]), torch.tensor([0, 0]), stats=stats).backward()
assert stats.snapshot().wait().tokens.tolist() == [2]
assert not any("mixloader.kernels" in name for name in sys.modules)
"""


def test_the_loss_works_where_triton_is_absent():
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], check=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_captured_cuda_graph_counts_at_every_replay(reduction):
    logits, targets, domain_ids = batch(8, 64, 1024, torch.bfloat16)
    logits = logits.detach().cuda().requires_grad_()
    targets, domain_ids = targets.cuda(), domain_ids.cuda()
    stats = DomainStats(3, "cuda", distribution=True)

    def step():
        loss = domain_cross_entropy(logits, targets, domain_ids, stats=stats, reduction=reduction, z_loss=1e-4).sum()
        loss.backward()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    expected = stats.snapshot().wait().sums
    logits.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for _ in range(3):
        graph.replay()
    assert (stats.snapshot().wait().sums == expected).all()
    assert loss.isfinite()
    graph.replay()
    assert (stats.snapshot().wait().sums * 3 == expected).all()
