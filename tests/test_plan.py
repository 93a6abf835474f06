"""The plan: the core against the plain-Python specification, and both against published vectors."""

import json
import math
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from corpora import tagged_domains
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixloader import MixLoader, _core
from mixloader.mixture import WEIGHT_ONE, as_fractions, quantize
from mixloader.reference import ReferenceStream, domain_key, permute, philox

# Random123's kat_vectors for philox4x32-10: key words, counter, result.
PHILOX_VECTORS = [
    ((0, 0), [0, 0, 0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ((2**32 - 1,) * 2, [2**32 - 1] * 4, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        (0xA4093822, 0x299F31D0),
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("key", "counter", "expected"), PHILOX_VECTORS)
@pytest.mark.parametrize("function", [philox, _core.philox])
def test_philox_gives_the_random123_vectors(function, key, counter, expected):
    assert list(function(key[0] | key[1] << 32, counter)) == expected


@given(
    seed=st.integers(0, 2**64 - 1),
    name=st.text(max_size=8),
    epoch=st.integers(0, 2**56 - 1),
    n=st.integers(1, 2**50),
    data=st.data(),
)
def test_permute_agrees_with_the_reference(seed, name, epoch, n, data):
    index = data.draw(st.integers(0, n - 1))
    key = domain_key(name)
    there = _core.permute(seed, key, epoch, n, index)
    assert 0 <= there < n
    assert there == permute(seed, key, epoch, n, index)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 17, 99, 1000, 4097])
def test_permute_is_a_bijection_that_changes_with_the_epoch(n):
    orders = [[_core.permute(1, domain_key("a"), epoch, n, i) for i in range(n)] for epoch in range(2)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert n < 16 or orders[0] != orders[1]


@pytest.mark.parametrize("n", [3, 4, 5])
def test_small_permutations_are_equally_likely(n):
    """Chi-square over all n! orders; the bound is the 0.9999 quantile (normal approximation)."""
    draws = 200 * math.factorial(n)
    orders = Counter(tuple(_core.permute(seed, 5, 0, n, i) for i in range(n)) for seed in range(draws))
    cells = math.factorial(n)
    expected = draws / cells
    statistic = sum((orders[o] - expected) ** 2 / expected for o in orders) + (cells - len(orders)) * expected
    assert statistic < (cells - 1) + 3.7 * math.sqrt(2 * (cells - 1)) + 5


def weight_histories(domains: int, steps: int):
    """{step: units}, the first at step 0, with zeros among the weights."""
    weights = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1.0)), min_size=domains, max_size=domains)
    units = weights.filter(any).map(lambda w: quantize(np.array(w)).tolist())
    return st.dictionaries(st.integers(1, steps - 1), units, max_size=4).flatmap(
        lambda later: units.map(lambda first: {0: first, **later})
    )


@st.composite
def stream_cases(draw):
    domains = draw(st.one_of(st.integers(1, 8), st.integers(9, 300)))
    seq_len = draw(st.integers(1, 9))
    shard_sizes = st.lists(st.integers(seq_len + 1, 12 * seq_len), min_size=1, max_size=3)
    sizes = {f"d{i}": draw(shard_sizes) for i in range(domains)}
    steps = draw(st.integers(2, 8))
    layouts = [(1, 1, 12), (1, 2, 6), (2, 2, 3), (3, 1, 4), (1, 12, 1), (4, 3, 1), (6, 2, 1)]
    return {
        "sizes": sizes,
        "seq_len": seq_len,
        "steps": steps,
        "seed": draw(st.integers(0, 2**64 - 1)),
        "weights": draw(weight_histories(domains, steps)),
        "layout": draw(st.sampled_from(layouts)),
        "resumed_layout": draw(st.sampled_from(layouts)),
        "resume_at": draw(st.integers(0, steps)),
        "num_workers": draw(st.integers(0, 2)),
    }


def rows_of_steps(data, case, layout, first, last, states=None):
    """{step: rows as (domain, window)} of steps [first, last), gathered over all ranks of a layout."""
    world_size, accumulation, batch_size = layout
    rows = {step: [None] * 12 for step in range(first, last)}
    end_states = []
    for rank in range(world_size):
        with MixLoader(
            data,
            batch_size,
            case["seq_len"],
            weights=np.array(case["weights"][0]),
            grad_accumulation_steps=accumulation,
            world_size=world_size,
            rank=rank,
            seed=case["seed"],
            num_workers=case["num_workers"],
            max_steps=last,
        ) as loader:
            if states is not None:
                loader.load_state_dict(json.loads(json.dumps(states)))
            for batch in loader:
                if batch["micro_step"] == accumulation - 1 and batch["step"] + 1 in case["weights"]:
                    assert loader.set_weights(np.array(case["weights"][batch["step"] + 1])) == batch["step"] + 1
                place = (batch["micro_step"] * world_size + rank) * batch_size
                for i in range(batch_size):
                    inputs, targets = batch["input_ids"][i].numpy(), batch["targets"][i].numpy()
                    domain, start = int(inputs[0]) >> 20, int(inputs[0]) & 0xFFFFF
                    assert batch["domain_ids"][i] == domain
                    assert (targets == inputs + 1).all(), "targets are the next tokens"
                    assert (inputs == inputs[0] + np.arange(len(inputs))).all(), "a window is a run of one shard"
                    rows[batch["step"]][place + i] = (domain, start)
            end_states.append(loader.state_dict())
    assert all(state == end_states[0] for state in end_states), "the state is the same on every rank"
    return rows, end_states[0]


def window_starts(sizes: list[int], seq_len: int) -> list[int]:
    """First token, counted through the domain, of each window in order."""
    starts, offset = [], 0
    for size in sizes:
        starts += range(offset, offset + (size - 1) // seq_len * seq_len, seq_len)
        offset += size
    return starts


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=stream_cases())
def test_the_stream_equals_the_reference(case):
    """G1, G2, G3: token for token, over domains, shards, weights, layouts, threads and a resume."""
    starts = [window_starts(sizes, case["seq_len"]) for sizes in case["sizes"].values()]
    reference = ReferenceStream(case["seed"], list(case["sizes"]), list(map(len, starts)), 12, case["weights"])
    expected = {}
    for step in range(case["steps"]):
        expected[step] = [(row.domain, starts[row.domain][row.window]) for row in reference.next_step()]
    with tempfile.TemporaryDirectory() as folder:
        data = tagged_domains(Path(folder), case["sizes"])
        middle = case["resume_at"]
        rows, state = rows_of_steps(data, case, case["layout"], 0, middle)
        more, end = rows_of_steps(data, case, case["resumed_layout"], middle, case["steps"], state)
    assert rows | more == expected
    assert end["cursors"] == reference.cursors
    assert end["residuals"] == reference.residuals


def harmonic(n: int) -> float:
    return sum(1 / i for i in range(1, n + 1))


@settings(deadline=None)
@given(
    data=st.data(),
    domains=st.integers(1, 40),
    rows=st.integers(1, 50),
    seed=st.integers(0, 1000),
    zeros=st.booleans(),
)
def test_counts_stay_within_the_stated_bound_of_the_quota(data, domains, rows, seed, zeros):
    """An adversary picks the weights of each step after seeing the residuals."""
    reference = ReferenceStream(seed, [f"d{i}" for i in range(domains)], [1 << 20] * domains, rows, {})
    low, high = -2.0, 2 * (harmonic(domains) - 1)
    if zeros:
        low, high = -(domains - 1), domains - 1
    for step in range(30):
        owed = np.array(reference.residuals)
        adversary = data.draw(st.sampled_from(["feed the richest", "feed the poorest", "pair", "random"]))
        weights = np.full(domains, 0.0 if zeros else 1e-3)
        if adversary == "feed the richest":
            weights[np.argsort(-owed)[: data.draw(st.integers(1, domains))]] += 1
        elif adversary == "feed the poorest":
            weights[np.argsort(owed)[: data.draw(st.integers(1, domains))]] += 1
        elif adversary == "pair":
            first = data.draw(st.integers(0, max(0, domains - 2)))
            weights[np.argsort(owed)[first : first + 2]] += 1
        else:
            weights += np.random.default_rng(step).random(domains)
        reference.weights[step] = quantize(weights).tolist()
        reference.next_step()
        excess = np.array(reference.residuals) / WEIGHT_ONE
        assert abs(excess.sum()) == 0
        assert low - 1e-9 <= excess.min()
        assert excess.max() <= high + 1e-9


def test_every_pair_of_domains_meets(tmp_path):
    """Related weights must not lock domains into fixed company: w = (1/2, 1/4, 1/4), two rows a step."""
    data = tagged_domains(tmp_path, {name: [4000] for name in "abc"})
    meetings = Counter()
    with MixLoader(data, 2, 4, weights=[2, 1, 1], max_steps=400) as loader:
        for batch in loader:
            meetings[tuple(sorted(batch["domain_ids"].tolist()))] += 1
    assert all(meetings[pair] >= 5 for pair in [(0, 1), (0, 2), (1, 2)]), meetings


@given(st.lists(st.floats(0, 1e300), min_size=1, max_size=50).filter(any))
def test_quantized_weights_sum_to_one_and_keep_their_order(weights):
    units = quantize(np.array(weights))
    assert units.sum() == WEIGHT_ONE
    assert (units >= 0).all()
    assert all(u == 0 for u, w in zip(units, weights, strict=True) if w == 0)
    order = np.argsort(weights, kind="stable")
    assert (np.diff(units[order]) >= -1).all(), "a greater weight is less by a rounding at most"
    exact = np.array(weights) / max(weights)
    assert np.allclose(units / WEIGHT_ONE, exact / exact.sum(), atol=1.1 / WEIGHT_ONE)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=300).filter(any))
def test_weights_read_back_and_set_again_are_the_same(weights):
    units = quantize(np.array(weights))
    assert np.array_equal(quantize(as_fractions(units)), units)
