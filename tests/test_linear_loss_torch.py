"""The loss from hidden states as torch operators: torch.compile, checkpointing, autocast, DDP and FSDP, CUDA."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from mixloader import DomainStats, LinearDomainCrossEntropy, domain_cross_entropy, linear_domain_cross_entropy
from mixloader.loss_path import LossInputs, LossOptions

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch about itself, when it compiles
]


def head(rows=4, tokens=6, width=8, n_classes=33, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(rows * tokens)
    shapes = (rows, tokens, width), (n_classes, width), (n_classes,)
    leaves = [torch.randn(shape, generator=generator).to(dtype).to(device).requires_grad_() for shape in shapes]
    targets = torch.randint(0, n_classes, (rows, tokens), generator=generator)
    targets[0, 0] = -100
    return leaves, targets.to(device), (torch.arange(rows) % 3).to(device)


OPTIONS = {
    "plain": {},
    "none": {"reduction": "none"},
    "everything": {
        "label_smoothing": 0.1,
        "z_loss": 1e-3,
        "softcap": 15.0,
        "domain_weights": torch.tensor([0.5, 1.0, 2.0]),
        "token_weights": torch.linspace(0, 2, 24).view(4, 6),
        "reference_losses": torch.linspace(0, 8, 24).view(4, 6),
        "denominator": torch.tensor(20),
    },
}


@pytest.mark.parametrize(
    ("backend", "name", "dtype", "autocast"),
    [
        pytest.param("inductor", "everything", torch.float32, False, marks=pytest.mark.slow),
        *(("aot_eager", name, torch.float32, False) for name in OPTIONS),
        ("aot_eager", "plain", torch.bfloat16, False),
        ("aot_eager", "everything", torch.float32, True),
        ("aot_eager", "plain", torch.float16, False),
    ],
)
def test_compiled_code_is_one_graph_and_gives_the_same(backend, name, dtype, autocast):
    leaves, targets, domain_ids = head(dtype=dtype)

    def step(hidden, weight, bias, targets, domain_ids, stats):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = linear_domain_cross_entropy(
                hidden * 1.5, weight, targets, domain_ids, bias=bias, stats=stats, chunk_bytes=5000, **OPTIONS[name]
            )
        return (loss * torch.linspace(-1, 2, loss.numel()).view(loss.shape)).sum() * 0.7

    stats = [DomainStats(3, distribution=True, token_bytes=range(33)) for _ in range(2)]
    expected = step(*leaves, targets, domain_ids, stats[0])
    gradients = torch.autograd.grad(expected, leaves)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    found = compiled(*leaves, targets, domain_ids, stats[1])
    found_gradients = torch.autograd.grad(found, leaves)
    assert torch.allclose(found, expected, rtol=1e-5)
    tolerance = 1e-5 if dtype == torch.float32 and not autocast else 2.0**-6
    for approximate, gradient in zip(found_gradients, gradients, strict=True):
        assert approximate.dtype == gradient.dtype
        assert torch.allclose(approximate.float(), gradient.float(), rtol=tolerance, atol=1e-6)
    assert stats[1].buffer[:, 0].sum() == 23
    assert torch.allclose(stats[0].buffer.double(), stats[1].buffer.double(), rtol=1e-6)
    # A second call does not compile again, and adds.
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(*leaves, targets, domain_ids, stats[1])
    assert stats[1].buffer[:, 0].sum() == 46


def test_one_graph_for_batches_of_all_sizes():
    stats = DomainStats(3)
    compiled = torch.compile(LinearDomainCrossEntropy(stats), fullgraph=True, backend="aot_eager", dynamic=True)
    for rows, tokens in ((4, 6), (5, 7), (3, 8), (9, 2)):
        (hidden, weight, _), targets, domain_ids = head(rows, tokens)
        found = compiled(hidden, weight, targets, domain_ids)
        assert torch.allclose(found, linear_domain_cross_entropy(hidden, weight, targets))
    assert stats.buffer[:, 0].sum() == 24 + 35 + 24 + 18 - 4


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "of compiled code", "compiled"])
def test_activation_checkpointing_counts_once(how, reduction):
    (hidden, weight, _), targets, domain_ids = head()
    stats = DomainStats(3)

    def loss(x, w):
        # What follows the loss saves a tensor, which keeps the recomputation from stopping before the loss.
        losses = linear_domain_cross_entropy(2 * x, w, targets, domain_ids, stats=stats, reduction=reduction)
        return losses.sum().square()

    def whole(x, w):
        return checkpoint(loss, x, w, use_reentrant=how == "reentrant")

    if how == "of compiled code":
        loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
    elif how == "compiled":
        whole = torch.compile(whole, fullgraph=True, backend="aot_eager")
    whole(hidden, weight).backward()
    assert stats.buffer[:, 0].sum() == 23
    logits = F.linear(2 * hidden, weight)
    expected = domain_cross_entropy(logits, targets, reduction=reduction).sum().square()
    for leaf, gradient in zip((hidden, weight), torch.autograd.grad(expected, (hidden, weight)), strict=True):
        assert torch.allclose(leaf.grad, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_refused(device, reduction):
    (hidden, weight, _), targets, _ = head(device=device)
    loss = linear_domain_cross_entropy(hidden, weight, targets, reduction=reduction).sum()
    for leaf in (hidden, weight):
        (gradient,) = torch.autograd.grad(loss * loss, leaf, create_graph=True, retain_graph=True)
        with pytest.raises(RuntimeError, match=r"linear_domain_cross_entropy cannot be differentiated again"):
            gradient.square().sum().backward()


def test_autocast_computes_in_its_dtype_and_adds_up_the_gradient_of_the_weight_in_that_of_the_weight(device):
    (hidden, weight, bias), targets, _ = head(device=device)
    with torch.autocast(device, torch.bfloat16):
        loss = linear_domain_cross_entropy(hidden, weight, targets, bias=bias)
        expected = domain_cross_entropy(F.linear(hidden, weight, bias), targets)
    assert torch.equal(loss, expected)
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.dtype == torch.float32
    assert not torch.equal(gradient, gradient.bfloat16().float())
    with torch.autocast(device, torch.bfloat16):  # which leaves float64 alone
        double = linear_domain_cross_entropy(hidden.double(), weight.double(), targets)
    assert double.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operators_are_what_torch_expects_of_one(device, dtype):
    (hidden, weight, bias), targets, domain_ids = head(1, 4, device=device)
    hidden = hidden.detach()[0].requires_grad_()
    inputs = LossInputs(hidden, targets[0], domain_ids)[1:]
    call = (hidden, weight, bias, *inputs, *LossOptions(softcap=9.0, z_loss=0.1), dtype, 64 * dtype.itemsize * 2)
    sums, divisor = DomainStats(3, device).buffer, torch.tensor([4.0, 0.25], device=device)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    operators = torch.ops.mixloader
    torch.library.opcheck(operators.linear_token_losses.default, (*call, sums), test_utils=checks)
    arguments = (*call, sums, divisor, [True, False, True])
    torch.library.opcheck(operators.linear_reduced_loss.default, arguments, test_utils=checks)
    with torch.no_grad():
        losses, saved = operators.linear_token_losses(*call, None)
        arguments = (*call, saved, torch.ones_like(losses), [False, True, True])
        torch.library.opcheck(operators.linear_token_gradients.default, arguments, test_utils=checks[::2])


class Tied(torch.nn.Module):
    """A model whose head is its embedding, and which computes its loss."""

    def __init__(self, loss):
        super().__init__()
        self.embedding, self.body = torch.nn.Embedding(33, 8), torch.nn.Linear(8, 8)
        self.loss = loss

    def forward(self, tokens, targets, domain_ids):
        return self.loss(self.body(self.embedding(tokens)), self.embedding.weight, targets, domain_ids)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")
@pytest.mark.parametrize("wrap", ["DDP", "FSDP"])
def test_a_model_with_a_tied_head_that_is_spread_over_ranks_trains_with_it(wrap):
    """One rank, where both must give the gradients of the bare model; the statistics stay out of the wrappers."""
    dist = pytest.importorskip("torch.distributed")
    stats = [DomainStats(3), DomainStats(3)]
    bare, spread = (Tied(LinearDomainCrossEntropy(counted)) for counted in stats)
    spread.load_state_dict(bare.state_dict())
    _, targets, domain_ids = head()
    tokens = torch.arange(24).view(4, 6)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        if wrap == "DDP":
            wrapped = torch.nn.parallel.DistributedDataParallel(spread)
        else:
            from torch.distributed.fsdp import fully_shard

            wrapped = fully_shard(spread, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        for model in (bare, wrapped):
            model(tokens, targets, domain_ids).backward()
        for found, expected in zip(spread.parameters(), bare.parameters(), strict=True):
            gradient = found.grad if wrap == "DDP" else found.grad.full_tensor()
            assert torch.allclose(gradient, expected.grad, rtol=1e-5, atol=1e-7)
        assert torch.equal(stats[0].buffer, stats[1].buffer)
        assert stats[0].buffer[:, 0].sum() == 23
    finally:
        dist.destroy_process_group()


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_training_on_cuda_never_waits_for_the_device_and_keeps_to_its_memory(dtype, reduction):
    leaves, targets, domain_ids = head(8, 512, 256, 50257, dtype, "cuda")
    stats = DomainStats(3, "cuda", distribution=True)
    options = {"stats": stats, "bias": leaves[2], "reduction": reduction, "chunk_bytes": 1 << 26}
    upstream = torch.full((8, 512) if reduction == "none" else (), 0.5, device="cuda")

    def step():
        linear_domain_cross_entropy(leaves[0], leaves[1], targets, domain_ids, **options).backward(upstream)
        for leaf in leaves:
            leaf.grad = None
        return stats.snapshot()

    step()  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    gradients = sum(leaf.numel() * (4 + leaf.element_size()) for leaf in leaves)
    assert torch.cuda.max_memory_allocated() - before <= (1 << 26) + gradients + (16 << 20)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_on_cuda_are_those_of_float64(dtype):
    leaves, targets, domain_ids = head(4, 512, 256, 50257, dtype, "cuda")
    with torch.no_grad():
        leaves[1] /= 8
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    F.cross_entropy(F.linear(*exact).flatten(0, 1), targets.flatten()).backward()
    hidden, weight, bias = leaves
    linear_domain_cross_entropy(hidden, weight, targets, domain_ids, bias=bias, chunk_bytes=1 << 25).backward()
    unit = max(torch.finfo(dtype).eps, 1e-4 if torch.backends.cuda.matmul.allow_tf32 else 1e-6)
    for leaf, other in zip(leaves, exact, strict=True):
        assert (leaf.grad.double() - other.grad).norm() <= 8 * unit * other.grad.norm()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_captured_cuda_graph_counts_at_every_replay(reduction):
    leaves, targets, domain_ids = head(8, 64, 64, 1024, torch.bfloat16, "cuda")
    stats = DomainStats(3, "cuda", distribution=True)
    options = {"stats": stats, "bias": leaves[2], "reduction": reduction, "chunk_bytes": 1 << 18}

    def step():
        linear_domain_cross_entropy(leaves[0], leaves[1], targets, domain_ids, **options).sum().backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    expected = stats.snapshot().wait().sums
    for leaf in leaves:
        leaf.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(3):
        graph.replay()
    assert (stats.snapshot().wait().sums == expected).all()
