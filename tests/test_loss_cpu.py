"""The loss on a CPU with every set of instructions: options, edges of float32, addresses, threads, exact sums."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_loss_features import CASES, check, name_of

from mixloader import _core, loss_cpu
from mixloader.loss import domain_cross_entropy
from mixloader.loss_path import LossInputs, LossOptions
from mixloader.stats import STATISTICS, DomainStats, add_tokens

HALVES = [torch.bfloat16, torch.float16]
INFINITY = torch.tensor(torch.inf)


@pytest.fixture(autouse=True, params=["base", "avx2", "avx512"])
def level(request, monkeypatch):
    if request.param not in _core.loss_levels():
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setattr(loss_cpu, "LEVEL", request.param)
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("options", CASES, ids=name_of)
def test_options_agree_with_float64(options):
    check(options, "cpu")


def test_unknown_instructions_are_refused(monkeypatch):
    monkeypatch.setattr(loss_cpu, "LEVEL", "sse9")
    with pytest.raises(ValueError, match="this machine has no sse9"):
        domain_cross_entropy(torch.zeros(1, 2), torch.tensor([0]))


def test_probabilities_are_accurate_wherever_float32_can_hold_them():
    """Of two classes, the gradient of the one that is not the target is its probability."""
    d = torch.linspace(-87.2, 0, 4001)
    logits = torch.stack([d, torch.zeros_like(d)], 1).requires_grad_()
    domain_cross_entropy(logits, torch.ones(len(d), dtype=torch.int64), reduction="sum").backward()
    p = torch.sigmoid(d.double())
    assert ((logits.grad[:, 0] / p - 1).abs() < 3 * 2.0**-24).all()
    # A target of certainty has a loss of the other's probability.
    losses = domain_cross_entropy(torch.tensor([[0.0, -30.0], [-120.0, 0.0]]), torch.tensor([0, 1]), reduction="none")
    assert losses.tolist() == pytest.approx([0.0, 0.0], abs=1e-7)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_is_read_exactly(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    inputs = LossInputs(every[:, None], torch.zeros(len(every), dtype=torch.int64))
    _, saved, _ = loss_cpu.forward(inputs, LossOptions(), None, None, None)
    assert torch.equal(saved[0], every.float())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_is_rounded_to_nearest(dtype):
    """The gradient at a certain class that is not the target is the scale."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    halves = halves[halves.isfinite()]
    ties = halves + (torch.nextafter(halves.to(dtype), halves.to(dtype) * 2).float() - halves) / 2
    ties = ties[ties.isfinite()]
    around = [ties, torch.nextafter(ties, INFINITY), torch.nextafter(ties, -INFINITY)]
    scale = torch.cat([halves, *around, torch.tensor([torch.inf, -torch.inf, torch.nan, 1e38, -70000.0, 1e-40])])
    logits = torch.tensor([0.0, -torch.inf]).to(dtype).expand(len(scale), 2)
    inputs = LossInputs(logits, torch.ones(len(scale), dtype=torch.int64))
    _, saved, _ = loss_cpu.forward(inputs, LossOptions(), None, None, None)
    found = loss_cpu.backward(inputs, LossOptions(), saved, scale, None)[:, 0]
    expected = scale.to(dtype)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(7.0, torch.inf, -torch.inf), expected.nan_to_num(7.0, torch.inf, -torch.inf))


@pytest.mark.parametrize("n_classes", [1, 3, 37, 300])
@pytest.mark.parametrize(
    "values",
    [
        [torch.nan],
        [torch.inf],
        [-torch.inf],
        [torch.inf, -torch.inf],
        [torch.nan, torch.inf],
        [3e38],
        [3e38, -3e38],
        [torch.finfo(torch.float32).min],
        [1e-45],
    ],
    ids=str,
)
def test_the_edges_of_float32_are_those_of_torch(n_classes, values):
    """Some of the logits, then all of them; in every lane and after the last whole vector."""
    some = torch.randn(8, n_classes, generator=torch.Generator().manual_seed(0))
    for row, at in enumerate((0, n_classes // 3, n_classes // 2, n_classes - 1)):
        for i, value in enumerate(values):
            some[row, (at + i) % n_classes] = value
    some[4:] = torch.tensor(values).repeat(n_classes)[:n_classes]
    targets = torch.tensor([0, n_classes - 1, n_classes // 2, n_classes // 3] * 2)
    results = []
    for logits, loss in (
        (some.clone(), lambda x: domain_cross_entropy(x, targets, reduction="none")),
        (some.double(), lambda x: F.cross_entropy(x, targets, reduction="none")),
    ):
        losses = loss(logits.requires_grad_())
        losses.sum().backward()
        results.append((losses.detach().double(), logits.grad.double()))
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found.float(), expected.float(), rtol=1e-5, atol=1e-6, equal_nan=True)


@given(st.integers(1, 700), st.integers(0, 31), st.sampled_from([torch.float32, *HALVES]), st.booleans())
def test_a_row_is_the_same_at_any_address_and_in_place(n_classes, offset, dtype, in_place):
    """Bit for bit, whatever stands around it, which stays as it is."""
    values = (torch.randn(n_classes, generator=torch.Generator().manual_seed(n_classes)) * 6).to(dtype)
    target = torch.tensor([n_classes // 2])
    inputs = LossInputs(values[None].clone(), target)
    options = LossOptions(label_smoothing=0.1)
    losses, saved, gradient = loss_cpu.forward(inputs, options, None, torch.ones(1), None)
    memory = torch.full((2, offset + n_classes + 40), torch.nan, dtype=dtype)
    memory[0, offset : offset + n_classes] = values
    here = memory[:1, offset : offset + n_classes]
    out = here if in_place else memory[1:, 3 : 3 + n_classes]
    found = loss_cpu.forward(inputs._replace(logits=here), options, None, torch.ones(1), out)
    assert torch.equal(found[0], losses)
    assert torch.equal(found[1], saved)
    assert torch.equal(found[2], gradient)
    assert torch.equal(out, gradient)
    around = torch.ones_like(memory, dtype=torch.bool)
    around[0, offset : offset + n_classes] = False
    around[1, 3 : 3 + n_classes] = in_place
    assert memory[around].isnan().all()


@pytest.mark.parametrize("flush", [False, True], ids=["", "denormals flushed"])
def test_threads_change_no_bit(threads, flush):
    logits = torch.randn(1200, 1023, generator=torch.Generator().manual_seed(0)) * 5
    logits[5, 7] = torch.nan
    targets = torch.arange(1200) % 1030
    targets[::9] = -100
    results = []
    for n in (1, 2, 3, 7, 64):
        threads(n)
        torch.set_flush_denormal(flush)
        stats = DomainStats(5, distribution=True, token_bytes=range(1023))
        inputs = LossInputs(logits, targets, torch.arange(1200) % 7 - 1, token_bytes=stats.token_bytes)
        options = LossOptions(distribution=True, z_loss=1e-4)
        losses, _, gradient = loss_cpu.forward(inputs, options, stats.buffer, torch.tensor([1e-36]), None)
        results.append([stats.buffer, losses.nan_to_num(-1.0), gradient.nan_to_num(-1.0)])
    for tensors in zip(*results, strict=True):
        assert all(torch.equal(tensor, tensors[0]) for tensor in tensors)


@given(st.randoms(use_true_random=False), st.booleans())
def test_sums_are_those_of_add_tokens_unit_for_unit(random, references):
    n, n_classes = 60, 19
    generator = torch.Generator().manual_seed(random.randrange(1 << 30))
    logits = torch.randn(n, n_classes, generator=generator) * 10 ** torch.empty(n, 1).uniform_(
        -3, 4, generator=generator
    )
    logits[:2, 3] = torch.tensor([torch.nan, torch.inf])
    targets = torch.randint(-2, n_classes + 1, (n,), generator=generator)
    targets[targets == -2] = -100
    ids = torch.randint(-3, 6, (n,), generator=generator)
    reference = torch.randn(n, generator=generator).exp() * 3 if references else None
    if reference is not None:
        reference[7] = torch.inf
    stats = DomainStats(4, token_bytes=torch.randint(0, 1 << 16, (n_classes,), generator=generator))
    losses = domain_cross_entropy(logits, targets, ids, stats=stats, reference_losses=reference, reduction="none")
    expected = DomainStats(4)
    valid = (targets >= 0) & (targets < n_classes)
    n_bytes = stats.token_bytes[targets.where(valid, 0)]
    add_tokens(expected.buffer, losses, ids, valid, targets == -100, reference_losses=reference, n_bytes=n_bytes)
    assert expected.buffer[:, 0].any()
    assert torch.equal(stats.buffer, expected.buffer)


def test_the_shape_of_the_distribution_is_counted_unit_for_unit():
    """Of a distribution whose statistics float32 holds exactly: n equal classes."""
    stats = DomainStats(1, distribution=True)
    logits = torch.full((1, 64), 3.0)
    domain_cross_entropy(logits, torch.tensor([9]), torch.tensor([0]), stats=stats)
    entropy, el2n = np.float32(np.log(64)), np.float32(np.sqrt(np.float32((1 - 1 / 64) ** 2 + 63 / 64**2)))
    units = [
        int(np.floor(float(value) * STATISTICS[name].scale + 0.5))
        for name, value in (("entropy", entropy), ("correct", 1), ("el2n", el2n))
    ]
    assert stats.buffer[0, 4:7].tolist() == units


FORKED = """
import os, torch
from mixloader import DomainStats, domain_cross_entropy
torch.set_num_threads(2)
x, y = torch.randn(400, 1000), torch.arange(400)
def losses():
    return domain_cross_entropy(x, y, reduction="none")
before = losses()
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(losses(), before) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.equal(losses(), before)
"""


def test_it_works_on_both_sides_of_a_fork(level):
    if level == "base":
        subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], check=True, timeout=100)


X, Y = np.zeros((4, 6), np.float32), np.zeros(4, np.int64)
READ_ONLY = np.zeros(4, np.float32)
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"logits": X[:3]}, r"logits are no array \[4, 6\]"),
        ({"logits": X.T.copy().T}, "classes side by side"),
        ({"logits": X.astype(np.float64)}, "logits are no float32, float16 or int16"),
        ({"logits": X[:, :0]}, "at least one class"),
        ({"targets": Y.astype(np.float32)}, "targets are no array of their type"),
        ({"domain_ids": Y[:3]}, "domain_ids are no divisor of rows"),
        ({"token_weights": X[0, :3]}, "token_weights are no contiguous array of 4"),
        ({"reference_losses": X[0, :3]}, "reference_losses are no contiguous array of 4"),
        ({"domain_weights": [1.0, 2.0]}, "domain_weights are no array"),
        ({"domain_weights": X[0, ::2]}, "domain_weights are no contiguous array of 3"),
        ({"token_bytes": np.zeros(5, np.int32)}, "token_bytes are no"),
        ({"losses": X[0, :5]}, "losses are no contiguous array of 4"),
        ({"losses": READ_ONLY}, "not writeable"),
        ({"saved": None}, r"saved are no array \[2, rows\]"),
        ({"saved": X[:1]}, "saved are no contiguous array of 8"),
        ({"gradient": X[:, :5]}, r"gradients are no array \[4, 6\]"),
        ({"gradient": X.astype(np.float16)}, r"gradients are no array \[4, 6\]"),
        ({"gradient": X, "scale": X[0, :3]}, "scales are no array of one"),
        ({"gradient": X, "scale": None}, "scales are no array of one"),
        ({"sums": np.zeros((2, 8), np.int64), "domain_ids": Y}, r"sums are no array \[domains \+ 1, 9\]"),
        ({"sums": np.zeros((2, 9), np.int64)}, "beside domain_ids"),
    ],
)
def test_the_core_checks_what_it_will_read_and_write(level, what, message):
    names = ("domain_ids", "token_weights", "domain_weights", "reference_losses", "token_bytes")
    given = {"logits": X, "targets": Y, **dict.fromkeys(names), "losses": X[0, :4].copy(), "saved": X[:2, :4].copy()}
    given |= {"gradient": None, "scale": None, "sums": None, **LossOptions()._asdict(), "level": level, "threads": 1}
    _core.loss_rows(**given)
    with pytest.raises(ValueError, match=message):
        _core.loss_rows(**given | what)
