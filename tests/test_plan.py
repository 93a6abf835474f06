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
from mixloader.errors import StateError, WeightsError
from mixloader.mixture import WEIGHT_ONE, quantize
from mixloader.reference import ReferenceStream, StreamEnd, WindowOrder, apportion, domain_key, permute, philox

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
    epoch=st.integers(0, 2**64 - 1),
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


NO_LIMIT = 2**64 - 1


@st.composite
def plan_cases(draw):
    """Any stream, without its data: options of ReferenceStream, and where to stop and go on."""
    domains = draw(st.one_of(st.integers(1, 6), st.integers(7, 60)))
    rows = draw(st.one_of(st.integers(1, 12), st.integers(13, 200)))
    steps = draw(st.integers(1, 6))
    shards = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any)
    some = st.one_of(st.none(), st.integers(0, 3 * rows), st.integers(0, 3 * rows // domains + 1))
    return {
        "seed": draw(st.integers(0, 2**64 - 1)),
        "names": [f"d{i}" for i in range(domains)],
        "windows": draw(st.lists(shards, min_size=domains, max_size=domains)),
        "rows": rows,
        "weights": draw(weight_histories(domains, max(2, steps))),
        "steps": steps,
        "start": draw(st.sampled_from([0, 0, 1, 2**31, 2**32 - 2, 2**63 - 1])),
        "options": {
            "shuffle": draw(st.booleans()),
            "shuffle_shards": draw(st.integers(0, 4)),
            "sampling": draw(st.sampled_from(["quota", "multinomial", "exact"])),
            "limits": draw(st.none() | st.lists(some, min_size=domains, max_size=domains)),
            "stop_at_limit": draw(st.booleans()),
        },
    }


def make_planner(seed, names, windows, rows, units, **options):
    """A Planner with the arguments of ReferenceStream."""
    limits = options.get("limits")
    sampling = getattr(_core.Sampling, options.get("sampling", "quota").upper())
    core = {
        "sampling": sampling,
        "limits": [NO_LIMIT if limit is None else limit for limit in limits or []],
    }
    windows = [[n] if isinstance(n, int) else n for n in windows]
    keys = [domain_key(name) for name in names]
    return _core.Planner(
        seed=seed, keys=keys, windows=windows, rows=rows, units=np.array(units), **{**options, **core}
    )  # fmt: skip


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=plan_cases())
def test_the_plan_equals_the_reference(case):
    """Every sampling, shuffle and limit; the step counter also near 2^63; a state in between."""
    history = {case["start"] + step: units for step, units in case["weights"].items()}
    arguments = case["seed"], case["names"], case["windows"], case["rows"]
    reference = ReferenceStream(*arguments, history, **case["options"])
    core = make_planner(*arguments, case["weights"][0], **case["options"])
    reference.step = case["start"]
    core.load_state({**core.state(), "step": case["start"]})
    for step in range(case["start"], case["start"] + case["steps"]):
        core.set_weights(np.array(reference.units()))
        assert core.effective_units().tolist() == reference.effective_units()
        try:
            expected = reference.next_step()
        except StreamEnd:
            expected = None
        domains, _, windows = core.plan(1)
        if expected is None:
            assert domains.shape == (0, case["rows"])
        else:
            assert list(zip(domains[0].tolist(), windows[0].tolist(), strict=True)) == expected
        state = {"step": reference.step, "cursors": reference.cursors, "residuals": reference.residuals}
        assert core.state() == state, f"at step {step}"
        if expected is None:
            return
        fresh = make_planner(*arguments, case["weights"][0], **case["options"])
        fresh.load_state(state)
        core = fresh


@given(data=st.data(), seed=st.integers(0, 2**64 - 1), shuffle=st.booleans(), together=st.integers(0, 5))
def test_window_orders_agree_with_the_reference_in_any_order(data, seed, shuffle, together):
    windows = data.draw(st.lists(st.integers(0, 2**40), min_size=1, max_size=8).filter(any))
    if shuffle and together:  # the reference makes a list of a block
        windows = [n % 40 for n in windows]
        windows[0] += not any(windows)
    epochs = 2**63 // sum(windows)
    draws = st.one_of(st.integers(0, 3 * sum(windows)), st.integers(0, epochs * sum(windows)))
    reference = WindowOrder(seed, domain_key("d"), windows, shuffle=shuffle, shuffle_shards=together)
    core = make_planner(seed, ["d"], [windows], 1, [WEIGHT_ONE], shuffle=shuffle, shuffle_shards=together)
    for draw in data.draw(st.lists(draws, max_size=20)):
        assert core.window(0, draw) == reference(draw)


@given(
    windows=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any),
    shuffle=st.booleans(),
    together=st.integers(0, 4),
    epoch=st.integers(0, 5),
)
def test_an_epoch_has_every_window_once_and_few_shards_at_a_time(windows, shuffle, together, epoch):
    core = make_planner(3, ["d"], [windows], 1, [WEIGHT_ONE], shuffle=shuffle, shuffle_shards=together)
    total = sum(windows)
    order = [core.window(0, epoch * total + i) for i in range(total)]
    assert sorted(order) == list(range(total))
    if shuffle and together:
        shards = np.searchsorted(np.cumsum(windows), order, side="right")
        spans = [np.flatnonzero(shards == s)[[0, -1]] for s in set(shards)]
        in_use = sum(np.bincount(np.arange(first, last + 1), minlength=total) for first, last in spans)
        assert max(in_use) <= together


@given(
    data=st.data(),
    windows=st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any),
    shuffle=st.booleans(),
    together=st.integers(0, 4),
    limit=st.integers(0, 14),
)
def test_upcoming_shards_are_those_that_the_next_draws_need(data, windows, shuffle, together, limit):
    core = make_planner(5, ["d"], [windows], 1, [WEIGHT_ONE], shuffle=shuffle, shuffle_shards=together)
    draw = data.draw(st.integers(0, 3 * sum(windows)))
    listed = core.upcoming(0, draw, limit)
    ends = np.cumsum(windows)
    first_need = {}
    for ahead in range(2 * sum(windows)):
        shard = int(np.searchsorted(ends, core.window(0, draw + ahead), side="right"))
        first_need.setdefault(shard, ahead)
    aheads, shards = [ahead for ahead, _ in listed], [shard for _, shard in listed]
    assert len(set(shards)) == len(shards) <= limit
    assert aheads == sorted(aheads)
    assert all(ahead <= first_need[shard] for ahead, shard in listed), "never later than it is needed"
    if not shuffle:
        assert listed == sorted((ahead, shard) for shard, ahead in first_need.items())[:limit]
    elif together:
        assert len(listed) == min(limit, len(first_need))
    else:
        assert all(first_need[shard] == ahead for ahead, shard in listed)
    if limit and shards:
        assert first_need[shards[0]] == 0, "the next draw's shard comes first"


def megatron_blend(weights, size):
    """build_blending_indices of megatron/core/datasets/helpers.cpp, in Python."""
    counts = [0] * len(weights)
    blend = []
    for i in range(size):
        errors = [w * max(float(i), 1.0) - n for w, n in zip(weights, counts, strict=True)]
        blend.append(errors.index(max(errors)))
        counts[blend[-1]] += 1
    return blend


@given(
    weights=st.lists(st.floats(0.001, 1), min_size=1, max_size=8),
    rows=st.integers(1, 40),
    steps=st.integers(1, 6),
)
def test_exact_sampling_is_megatrons_blend(weights, rows, steps):
    units = quantize(np.array(weights))
    names = [f"d{i}" for i in range(len(weights))]
    domains, draws, _ = make_planner(0, names, [5] * len(weights), rows, units, sampling="exact").plan(steps)
    assert domains.ravel().tolist() == megatron_blend((units / WEIGHT_ONE).tolist(), rows * steps)
    for domain in range(len(weights)):
        own = draws[domains == domain]
        assert own.tolist() == list(range(len(own))), "draws in order"


def test_exact_sampling_is_the_blend_that_megatron_itself_makes():
    helpers = pytest.importorskip("megatron.core.datasets.helpers_cpp")
    units = quantize(np.array([0.45, 0.3, 0.15, 0.1]))
    blend, sample = np.zeros(4000, dtype=np.int16), np.zeros(4000, dtype=np.int64)
    helpers.build_blending_indices(blend, sample, units / WEIGHT_ONE, 4, 4000, False)
    domains, draws, _ = make_planner(0, list("abcd"), [9] * 4, 40, units, sampling="exact").plan(100)
    assert np.array_equal(domains.ravel(), blend)
    assert np.array_equal(draws.ravel(), sample)


def test_multinomial_rows_are_independent_draws():
    """Chi-square of counts and of pairs of neighbours; the bounds are about the 0.9999 quantiles."""
    units = quantize(np.array([4.0, 3.0, 2.0, 1.0, 0.0]))
    names = list("abcde")
    domains, _, _ = make_planner(11, names, [99] * 5, 100, units, sampling="multinomial").plan(1000)
    rows = domains.ravel()[:, None] == np.arange(4)
    p = units[:4] / WEIGHT_ONE
    counts = rows.sum(axis=0)
    assert ((counts - len(rows) * p) ** 2 / (len(rows) * p)).sum() < 21.1  # 3 degrees of freedom
    pairs = rows[::2].T.astype(int) @ rows[1::2]
    expected = len(rows) / 2 * p[:, None] * p
    assert ((pairs - expected) ** 2 / expected).sum() < 44.3  # 15 degrees of freedom


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


@settings(deadline=None, max_examples=200)
@given(
    data=st.data(), domains=st.integers(1, 12), rows=st.integers(1, 50), sampling=st.sampled_from(["quota", "exact"])
)
def test_limits_keep_the_stated_bound_and_the_weights_of_the_others(data, domains, rows, sampling):
    """Also when several domains reach their limits in one step."""
    limits = [*data.draw(st.lists(st.integers(0, 200), min_size=domains - 1, max_size=domains - 1)), None]
    weights = np.array(data.draw(st.lists(st.floats(0.01, 1), min_size=domains, max_size=domains)))
    names = [f"d{i}" for i in range(domains)]
    core = make_planner(1, names, [7] * domains, rows, quantize(weights), limits=limits, sampling=sampling)
    for _ in range(20):
        assert core.skip(1) == 1
        state = core.state()
        residuals = np.array(state["residuals"]) / WEIGHT_ONE
        assert residuals.sum() == 0
        assert all(n <= limit for n, limit in zip(state["cursors"], limits, strict=True) if limit is not None)
        assert residuals.min() > -2
        assert residuals.max() < max(1, 2 * (domains - 1))
    closed = np.array([n == limit for n, limit in zip(state["cursors"], limits, strict=True)])
    if (~closed).sum() > 1:
        share = core.effective_units()[~closed] / WEIGHT_ONE
        assert np.allclose(share, weights[~closed] / weights[~closed].sum(), atol=1e-8)


def test_a_step_that_meets_a_limit_gives_its_rows_to_the_others_in_proportion():
    """The limit is met in the middle of a step of 100 rows: 3 of `a`, and 97 in the ratio 2 to 1."""
    units = quantize(np.array([0.7, 0.2, 0.1]))
    core = make_planner(0, list("abc"), [50] * 3, 100, units, limits=[3, None, None])
    assert core.skip(1) == 1
    a, b, c = core.state()["cursors"]
    assert a == 3
    assert abs(b - 97 * 2 / 3) <= 2
    assert b + c == 97
    assert core.effective_units().tolist() == apportion(WEIGHT_ONE, [0, *units[1:].tolist()])


@pytest.mark.parametrize("sampling", ["quota", "multinomial", "exact"])
def test_the_stream_ends_at_the_step_that_needs_more_than_a_limit(sampling):
    options = {"limits": [40, 10], "sampling": sampling, "stop_at_limit": True}
    core = make_planner(0, ["a", "b"], [50, 50], 10, quantize(np.ones(2)), **options)
    free = make_planner(0, ["a", "b"], [50, 50], 10, quantize(np.ones(2)), sampling=sampling)
    steps = core.skip(100)
    assert free.skip(steps) == steps
    assert core.state() == free.state()
    assert core.state()["cursors"][1] <= 10
    assert free.skip(1) == 1
    assert free.state()["cursors"][1] > 10
    assert core.skip(1) == 0, "the state is as it was"
    core.set_weights(quantize(np.array([1.0, 0.0])))
    assert core.skip(1) == 1, "other weights revive it"


def test_a_stream_whose_domains_are_all_at_their_limits_ends_whole():
    options = {"limits": [7, 20, None]}
    core = make_planner(0, list("abc"), [50] * 3, 10, quantize(np.array([1.0, 1.0, 0.0])), **options)
    assert core.skip(10) == 2
    assert sum(core.state()["cursors"]) == 20
    assert core.plan(3)[0].shape == (0, 10)
    core.set_weights(quantize(np.array([1.0, 1.0, 1.0])))
    assert core.skip(2) == 2
    assert core.effective_units().tolist()[0] == 0


def test_cursors_and_steps_near_2_to_the_63():
    """No counter is a float, and none wraps."""
    units, start = quantize(np.array([3.0, 1.0])), 2**63 - 5
    reference = ReferenceStream(9, ["a", "b"], [[3, 1], [1]], 12, {0: units.tolist()})
    core = make_planner(9, ["a", "b"], [[3, 1], [1]], 12, units)
    reference.step, reference.cursors = start, [start, 2**64 - 100]
    core.load_state({"step": start, "cursors": [start, 2**64 - 100], "residuals": [0, 0]})
    for _ in range(8):
        domains, _, windows = core.plan(1)
        assert list(zip(domains[0].tolist(), windows[0].tolist(), strict=True)) == reference.next_step()
    assert core.state()["cursors"] == reference.cursors
    assert core.skip(100) == 100, "draws end at 2^64 as at any limit"
    assert core.state()["cursors"][1] == 2**64 - 1


def test_what_cannot_be_planned_is_refused():
    one = quantize(np.ones(1))
    with pytest.raises(ValueError, match="rows must be in"):
        make_planner(0, ["a"], [5], 2**31 + 1, one)
    with pytest.raises(ValueError, match="has no window in any shard"):
        make_planner(0, ["a"], [[0, 0]], 1, one)
    with pytest.raises(ValueError, match="an entry for each domain"):
        make_planner(0, ["a"], [5], 1, one, limits=[1, 2])
    core = make_planner(0, ["a"], [5], 1, one)
    for units in ([], [WEIGHT_ONE - 1], [WEIGHT_ONE, 0], [-1]):
        with pytest.raises(WeightsError, match="integer weights"):
            core.set_weights(np.array(units, dtype=np.int64))
    with pytest.raises(StateError, match="the plan has 1 domains"):
        core.load_state({"step": 0, "cursors": [0, 0], "residuals": [0, 0]})
