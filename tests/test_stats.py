"""Sums of token losses by domain: exact integers, the same in any order and any split."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from mixloader import stats as module
from mixloader.errors import MixLoaderError, StatsError
from mixloader.loss import domain_cross_entropy
from mixloader.stats import DomainStats

EDGES = [0.0, 2.0**-25, 3 * 2.0**-25, 0.5, 1024 - 2.0**-14, 1024.0, 2.0**100]
finite_losses = st.floats(0, 3000, width=32) | st.sampled_from(EDGES)


def tensors(losses, ids):
    losses = torch.tensor(losses, dtype=torch.float32)
    yes = torch.ones(len(losses), dtype=torch.bool)
    return losses, torch.tensor(ids, dtype=torch.int64), yes, ~yes


def nearest(exact: Fraction) -> int:
    """The nearest integer, half upwards, in exact arithmetic."""
    return (2 * exact + 1).__floor__() // 2


def test_columns_and_a_sum_by_hand():
    stats = DomainStats(2)
    stats.add(*tensors([1.5, 2.0, 0.25], [1, 1, 0]))
    assert stats.COLUMNS == ("tokens", "loss", "loss_sq", "bad")
    table = stats.snapshot().wait()
    assert table.tokens.tolist() == [1, 2]
    assert table.loss_sum.tolist() == [0.25, 3.5]
    assert table.loss_sq_sum.tolist() == [0.0625, 6.25]
    assert table.bad == 0
    assert table.sums.dtype == np.int64
    assert table.sums.tolist() == [[1, 1 << 22, 1 << 12, 0], [2, 7 << 23, 25 << 14, 0], [0, 0, 0, 0]]


@given(st.lists(st.tuples(finite_losses, st.integers(0, 3)), max_size=50))
def test_units_equal_exact_rational_arithmetic(tokens):
    stats = DomainStats(4)
    stats.add(*tensors([loss for loss, _ in tokens], [domain for _, domain in tokens]))
    expected = [[0] * 4 for _ in range(5)]
    for loss, domain in tokens:
        nats = min(Fraction(loss), Fraction(1024))
        expected[domain][0] += 1
        expected[domain][1] += nearest(nats * 2**24)
        expected[domain][2] += nearest(nats**2 * 2**16)
    assert stats.buffer.tolist() == expected


@given(st.data())
def test_sums_do_not_depend_on_order_or_split(data):
    tokens = data.draw(st.lists(st.tuples(finite_losses | st.just(float("nan")), st.integers(-2, 3)), max_size=60))
    shuffled = data.draw(st.permutations(tokens))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=4)))
    whole, parts = DomainStats(3), DomainStats(3)
    whole.add(*tensors([loss for loss, _ in tokens], [domain for _, domain in tokens]))
    for start, stop in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        part = shuffled[start:stop]
        parts.add(*tensors([loss for loss, _ in part], [domain for _, domain in part]))
    assert torch.equal(whole.buffer, parts.buffer)


def test_a_snapshot_drains_and_sums_of_snapshots_are_exact():
    stats, whole = DomainStats(2), DomainStats(2)
    first = tensors([0.1, 0.2], [0, 1])
    second = tensors([0.3], [1])
    stats.add(*first)
    one = stats.snapshot()
    stats.add(*second)
    two = stats.snapshot()
    assert one.ready()
    assert not stats.buffer.any()
    whole.add(*first)
    whole.add(*second)
    assert np.array_equal(one.wait().sums + two.wait().sums, whole.snapshot().wait().sums)


def test_the_buffer_keeps_its_address():
    stats = DomainStats(2)
    address = stats.buffer.data_ptr()
    stats.snapshot()
    assert stats.buffer.data_ptr() == address


def test_losses_above_the_clamp_count_as_the_clamp():
    stats = DomainStats(1)
    stats.add(*tensors([1e30, 1025.0], [0, 0]))
    table = stats.snapshot().wait()
    assert table.loss_sum.tolist() == [2048.0]
    assert table.loss_sq_sum.tolist() == [2.0 * 1024**2]


def test_the_stated_range_fits_64_bits():
    most = {1: int(module.LOSS_CLAMP * module.LOSS_SCALE), 2: int(module.LOSS_CLAMP**2 * module.LOSS_SQ_SCALE)}
    stats = DomainStats(1)
    stats.add(*tensors([float("3e38")], [0]))
    for column, units in most.items():
        assert stats.buffer[0, column].item() == units
        assert units * module.MAX_TOKENS <= 2**63


def test_more_tokens_than_the_range_holds_are_an_error():
    stats = DomainStats(2)
    stats.buffer[1, 0] = module.MAX_TOKENS
    assert stats.snapshot().wait().tokens.tolist() == [0, module.MAX_TOKENS]
    stats.buffer[1, 0] = module.MAX_TOKENS + 1
    with pytest.raises(StatsError, match=r"domain 1 has 134217729 tokens.*Call snapshot\(\) more often"):
        stats.snapshot().wait()


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_bad_loss_counts_as_bad_and_nowhere_else(loss):
    stats = DomainStats(3)
    stats.add(*tensors([loss, 1.0, loss], [2, 2, -1]))
    snapshot = stats.snapshot()
    with pytest.raises(StatsError, match="1 in domain 2, 1 in no domain") as caught:
        snapshot.wait()
    assert isinstance(caught.value, MixLoaderError)
    table = caught.value.table
    assert table.bad == 2
    assert table.tokens.tolist() == [0, 0, 1]
    assert table.loss_sum.tolist() == [0.0, 0.0, 1.0]


def test_domain_ids_out_of_range_are_bad_and_minus_one_counts_nowhere():
    stats = DomainStats(2)
    stats.add(*tensors([1.0, 1.0, 1.0, 1.0], [-1, -2, 2, 1 << 40]))
    assert stats.buffer.tolist() == [[0] * 4, [0] * 4, [0, 0, 0, 3]]


def test_ignored_tokens_count_nowhere_whatever_their_domain():
    stats = DomainStats(2)
    losses, ids, yes, no = tensors([float("nan"), 1.0], [0, 7])
    stats.add(losses, ids, no, yes)
    assert not stats.buffer.any()


def test_paused_nests_and_ends_with_its_context():
    stats = DomainStats(1)
    assert stats.counting()
    with stats.paused():
        with stats.paused():
            pass
        assert not stats.counting()
    assert stats.counting()
    with pytest.raises(KeyError), stats.paused():
        raise KeyError
    assert stats.counting()
    with torch.no_grad():
        assert not stats.counting()
    with torch.inference_mode():
        assert not stats.counting()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_a_checkpoint_inside_a_checkpoint_counts_once(outer, inner):
    stats = DomainStats(1)
    logits, targets = torch.randn(4, 9, requires_grad=True), torch.zeros(4, dtype=torch.int64)

    def head(x):
        # The square saves a tensor, which keeps the recomputation from stopping before the loss.
        return domain_cross_entropy(x, targets, targets, stats=stats).square()

    def body(x):
        return checkpoint(head, x * 1.0, use_reentrant=inner).square()

    checkpoint(body, logits, use_reentrant=outer).backward()
    assert stats.snapshot().wait().tokens.tolist() == [4]


@pytest.mark.parametrize("n", [0, -1, 2.0, "3"])
def test_number_of_domains_is_checked(n):
    with pytest.raises(ValueError, match="expected an integer of at least 1"):
        DomainStats(n)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_snapshots_on_cuda_arrive_without_waiting():
    stats, host = DomainStats(5, "cuda"), DomainStats(5)
    steps = [tensors([step + 0.5] * 64, [step % 5] * 64) for step in range(20)]
    on_device = [[x.cuda() for x in step] for step in steps]
    torch.cuda.set_sync_debug_mode("error")
    try:
        snapshots = []
        for step in on_device:
            stats.add(*step)
            snapshots.append(stats.snapshot())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for step, snapshot in zip(steps, snapshots, strict=True):
        host.add(*step)
        assert np.array_equal(snapshot.wait().sums, host.snapshot().wait().sums)
