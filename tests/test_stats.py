"""Sums of token losses by domain: exact integers, the same in any order and any split."""

from __future__ import annotations

import math
import subprocess
import sys
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
from mixloader.stats import DomainStats, StatsTable

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
    assert stats.COLUMNS == ("tokens", "loss", "loss_sq", "excess", "entropy", "correct", "el2n", "bytes", "bad")
    table = stats.snapshot().wait()
    assert table.tokens.tolist() == [1, 2]
    assert table.loss_sum.tolist() == [0.25, 3.5]
    assert table.loss_sq_sum.tolist() == [0.0625, 6.25]
    assert table.bad == 0
    assert table.sums.dtype == np.int64
    assert table.sums[:, :3].tolist() == [[1, 1 << 22, 1 << 12], [2, 7 << 23, 25 << 14], [0, 0, 0]]
    assert not table.sums[:, 3:].any()


@given(st.lists(st.tuples(*[finite_losses] * 5, st.integers(0, 70000), st.booleans(), st.integers(0, 3)), max_size=50))
def test_units_equal_exact_rational_arithmetic(tokens):
    columns = [list(column) for column in zip(*tokens, strict=True)] or [[]] * 8
    losses, references, entropy, el2n, _, n_bytes, correct, ids = columns
    stats = DomainStats(4)
    stats.add(
        *tensors(losses, ids),
        reference_losses=torch.tensor(references, dtype=torch.float32),
        entropy=torch.tensor(entropy, dtype=torch.float32),
        correct=torch.tensor(correct, dtype=torch.bool),
        el2n=torch.tensor(el2n, dtype=torch.float32),
        n_bytes=torch.tensor(n_bytes, dtype=torch.int32),
    )
    expected = [[0] * 9 for _ in range(5)]
    for loss, reference, entropy, el2n, _, n_bytes, correct, domain in tokens:
        nats = min(Fraction(loss), Fraction(1024))
        row = expected[domain]
        row[0] += 1
        row[1] += nearest(nats * 2**24)
        row[2] += nearest(nats**2 * 2**16)
        # A difference may have more digits than a double, whose arithmetic it is then.
        row[3] += math.floor(min(max(loss - reference, 0.0), 1024.0) * 2**24 + 0.5)
        row[4] += nearest(min(Fraction(entropy), Fraction(1024)) * 2**24)
        row[5] += correct
        row[6] += nearest(min(Fraction(el2n), Fraction(2)) * 2**24)
        row[7] += min(n_bytes, 1 << 16)
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
    stats = DomainStats(1)
    most = torch.tensor([3e38])
    stats.add(
        *tensors([3e38], [0]),
        reference_losses=torch.zeros(1),
        entropy=most,
        correct=torch.ones(1, dtype=torch.bool),
        el2n=most,
        n_bytes=torch.tensor([2**31 - 1]),
    )
    units = [int(statistic.clamp * statistic.scale) for statistic in module.STATISTICS.values()]
    assert stats.buffer[0].tolist() == [*units[:-1], 0]
    assert max(units) * module.MAX_TOKENS <= 2**63


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
    assert not stats.buffer[:, :-1].any()
    assert stats.buffer[:, -1].tolist() == [0, 0, 3]


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


def test_the_error_names_the_domain():
    stats = DomainStats(2, names=["prose", "maths"])
    stats.add(*tensors([float("nan")], [1]))
    with pytest.raises(StatsError, match=r"1 in domain 1 \('maths'\)\."):
        stats.snapshot().wait()
    with pytest.raises(ValueError, match="1 names are given for 2 domains"):
        DomainStats(2, names=["prose"])


@pytest.mark.parametrize("not_finite", [float("nan"), float("inf"), float("-inf")])
def test_a_reference_loss_that_is_not_finite_is_bad(not_finite):
    stats = DomainStats(2)
    stats.add(*tensors([1.0, 2.0], [0, 1]), reference_losses=torch.tensor([not_finite, 0.5]))
    assert stats.buffer[:, -1].tolist() == [1, 0, 0]
    assert stats.buffer[0, :-1].tolist() == [0] * 8
    assert StatsTable(stats.buffer.numpy()).column("excess").tolist() == [0.0, 1.5]


def test_bits_per_byte():
    stats = DomainStats(2, token_bytes=[0, 3, 5])
    assert stats.token_bytes.dtype == torch.int32
    targets = torch.tensor([1, 2])
    stats.add(*tensors([np.log(2) * 4, np.log(2) * 12], [0, 0]), n_bytes=stats.token_bytes[targets])
    table = stats.snapshot().wait()
    assert table.bits_per_byte[0] == pytest.approx(2.0)
    assert np.isnan(table.bits_per_byte[1])


@pytest.mark.parametrize(
    ("token_bytes", "message"),
    [([1, -1], r"token_bytes\[1\] is -1"), ([1 << 17], "expected 0 to 65536"), ([[1]], "shape"), ([0.5], "float32")],
)
def test_token_bytes_are_checked(token_bytes, message):
    with pytest.raises(ValueError, match=message):
        DomainStats(1, token_bytes=token_bytes)


RANK = """
import sys
import torch, torch.distributed as dist
from mixloader.stats import DomainStats, StatsTable
from mixloader.errors import StatsError
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
stats, yes = DomainStats(3), torch.ones(4, dtype=torch.bool)
snapshots = []
for step in range(3):
    losses = torch.tensor([0.1, 0.2, 0.3, 0.4]) * (step + 1) * (rank + 1)
    stats.add(losses, torch.tensor([0, 1, rank, 2]), yes, ~yes)
    if step < 2:
        snapshots.append(stats.snapshot(dist.group.WORLD))
for snapshot in snapshots:
    print(snapshot.wait().sums.tolist())
    assert snapshot.ready()
stats.add(torch.full((4,), torch.nan if rank else 1.0), torch.full((4,), 2), yes, ~yes)
try:
    stats.snapshot(dist.group.WORLD).wait()
except StatsError as error:
    print(error)
dist.destroy_process_group()
"""


def test_a_snapshot_of_a_group_holds_the_sums_of_all_ranks(tmp_path):
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    printed = [rank.communicate(timeout=120)[0].decode().splitlines() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert printed[0] == printed[1]
    yes = torch.ones(4, dtype=torch.bool)
    for step in range(2):
        alone = DomainStats(3)
        for rank in range(2):
            losses = torch.tensor([0.1, 0.2, 0.3, 0.4]) * (step + 1) * (rank + 1)
            alone.add(losses, torch.tensor([0, 1, rank, 2]), yes, ~yes)
        assert printed[0][step] == str(alone.buffer.tolist())
    assert "4 in domain 2" in printed[0][2]


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
