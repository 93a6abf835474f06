"""MixLoader as a user meets it: batches, the clock of set_weights, resume, errors, threads."""

import gc
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections import deque

import numpy as np
import pytest
import torch
from corpora import tagged, tagged_domains, write_llmc, write_raw

from mixloader import MixLoader
from mixloader.errors import ManifestError, ShardError, StateError, TokenError, WeightsError
from mixloader.mixture import WEIGHT_ONE


@pytest.fixture
def data(tmp_path):
    return tagged_domains(tmp_path, {"web": [700, 300], "code": [400], "math": [90]})


def tokens_of(batches):
    return torch.stack([batch["input_ids"] for batch in batches])


def test_a_batch_holds_next_tokens_domains_and_its_place(data):
    with MixLoader(data, 4, 8, grad_accumulation_steps=2, max_steps=3) as loader:
        assert len(loader) == 6
        batches = list(loader)
        assert len(loader) == 0
    assert [(b["step"], b["micro_step"]) for b in batches] == [(s, m) for s in range(3) for m in range(2)]
    for batch in batches:
        assert batch["input_ids"].dtype == batch["targets"].dtype == batch["domain_ids"].dtype == torch.int64
        assert batch["input_ids"].shape == batch["targets"].shape == (4, 8)
        assert batch["input_ids"].is_contiguous()
        assert batch["targets"].is_contiguous(), "nanoGPT calls targets.view(-1)"
        assert torch.equal(batch["targets"], batch["input_ids"] + 1)
        assert torch.equal(batch["input_ids"][:, 0] >> 20, batch["domain_ids"])


def test_a_batch_may_be_kept(data):
    with MixLoader(data, 4, 8, max_steps=20) as loader:
        kept = [(batch["input_ids"], batch["input_ids"].clone()) for batch in loader]
    assert all(torch.equal(held, copy) for held, copy in kept)


def test_every_window_comes_once_an_epoch(data):
    with MixLoader(data, 1, 8, weights={"code": 1}) as loader:
        windows = int(loader.windows[1])
        for _ in range(3):
            starts = [int(next(loader)["input_ids"][0, 0]) & 0xFFFFF for _ in range(windows)]
            assert sorted(starts) == list(range(0, windows * 8, 8))


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_set_weights_applies_to_the_next_step_though_prefetch_is_full(data, num_workers):
    with MixLoader(data, 4, 8, num_workers=num_workers) as loader:
        next(loader)
        time.sleep(0.05)  # let the readers run as far ahead as they may
        for step, domain in enumerate([2, 0, 1, 2], start=1):
            weights = np.eye(3)[domain]
            assert loader.set_weights(weights) == step
            batch = next(loader)
            assert batch["step"] == step
            assert batch["weights_version"] == step
            assert set(batch["domain_ids"].tolist()) == {domain}
            assert np.array_equal(loader.weights, weights)


def test_a_change_inside_an_accumulation_group_takes_the_next_step(data):
    with MixLoader(data, 4, 8, grad_accumulation_steps=3) as loader:
        next(loader)
        assert loader.set_weights({"math": 1.0}) == 1
        rest = [next(loader) for _ in range(2)]
        assert all(batch["step"] == 0 and batch["weights_version"] == 0 for batch in rest)
        assert set(next(loader)["domain_ids"].tolist()) == {2}


def test_a_change_for_a_later_step_waits_for_it(data):
    with MixLoader(data, 4, 8) as loader:
        assert loader.set_weights([0, 0, 1], step=3) == 3
        assert loader.set_weights([0, 1, 0]) == 0
        domains = [set(next(loader)["domain_ids"].tolist()) for _ in range(5)]
        assert domains == [{1}, {1}, {1}, {2}, {2}]
        with pytest.raises(WeightsError, match="step 4 has begun; weights can change from step 5 on"):
            loader.set_weights([1, 0, 0], step=4)


@pytest.mark.parametrize(
    "weights",
    [
        [1, 2, 3],
        np.array([1, 2, 3]),
        torch.tensor([1.0, 2.0, 3.0]),
        {"math": 3, "web": 1, "code": 2},
        (1e-320, 2e-320, 3e-320),
    ],
)
def test_weights_come_in_every_usual_shape(data, weights):
    with MixLoader(data, 4, 8, weights=weights) as loader:
        assert loader.units.sum() == WEIGHT_ONE
        assert np.allclose(loader.weights, np.array([1, 2, 3]) / 6, rtol=1e-3)


def test_without_weights_the_mixture_is_each_domains_share_of_tokens(data):
    with MixLoader(data, 4, 8) as loader:
        assert np.allclose(loader.weights, np.array([1000, 400, 90]) / 1490)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, float("nan"), 0.5], "domain 'code' is nan"),
        ([0.5, -0.1, 0.6], "domain 'code' is -0.1"),
        ([0.5, float("inf"), 0.6], "domain 'code' is inf"),
        ([0, 0, 0], "all weights are zero"),
        ([0.5, 0.5], r"shape \[2\]; expected \[3\]"),
        ([[0.5, 0.3, 0.2]], r"shape \[1, 3\]; expected \[3\]"),
        ({"web": 1, "physics": 1}, "unknown domain 'physics' in weights; the domains are web, code, math"),
        ("web", "weights must be numbers"),
    ],
)
def test_weights_that_are_no_mixture_change_nothing(data, weights, message):
    with MixLoader(data, 4, 8) as loader:
        before = loader.state_dict()
        with pytest.raises(WeightsError, match=message):
            loader.set_weights(weights)
        assert loader.state_dict() == before
    with pytest.raises(WeightsError, match=message):
        MixLoader(data, 4, 8, weights=weights)


def test_state_is_what_was_consumed_and_resumes_exactly(data):
    with MixLoader(data, 4, 8, grad_accumulation_steps=2, seed=7, num_workers=2) as loader:
        loader.set_weights([1, 1, 1], step=5)
        for _ in range(7):
            next(loader)
        state = json.loads(json.dumps(loader.state_dict()))
        assert loader.state_dict() == state
        expected = [next(loader) for _ in range(20)]
    with MixLoader(data, 4, 8, grad_accumulation_steps=2, seed=7, num_workers=0) as loader:
        next(loader)
        loader.load_state_dict(state)
        assert loader.state_dict() == state
        resumed = [next(loader) for _ in range(20)]
    assert torch.equal(tokens_of(expected), tokens_of(resumed))
    keys = ("step", "micro_step", "weights_version")
    assert [[b[k] for k in keys] for b in expected] == [[b[k] for k in keys] for b in resumed]


def test_state_survives_a_rewind_while_readers_run_ahead(data):
    with MixLoader(data, 4, 8, num_workers=3) as loader:
        state = loader.state_dict()
        first = tokens_of([next(loader) for _ in range(30)])
        for _ in range(5):
            loader.load_state_dict(state)
            assert torch.equal(first, tokens_of([next(loader) for _ in range(30)]))


def test_state_is_small(tmp_path):
    data = tagged_domains(tmp_path, {f"domain_{i:02d}": [200] for i in range(16)})
    with MixLoader(data, 32, 8) as loader:
        loader.set_weights(np.random.default_rng(0).random(16))
        for _ in range(100):
            next(loader)
        state = loader.state_dict()
        # Cursors as they are after 10^6 steps of 10^3 rows.
        state["cursors"] = [10**9] * 16
        state["step"] = 10**6
        assert len(json.dumps(state)) <= 2048


def test_another_global_batch_goes_on_from_the_same_windows(data):
    with MixLoader(data, 4, 8, weights={"code": 1}) as loader:
        seen = {int(t) for _ in range(5) for t in next(loader)["input_ids"][:, 0]}
        state = loader.state_dict()
        windows = int(loader.windows[1])
    with MixLoader(data, 1, 8, weights={"code": 1}) as loader:
        loader.load_state_dict(state)
        rest = {int(next(loader)["input_ids"][0, 0]) for _ in range(windows - 20)}
    assert len(seen) == 20
    assert len(seen | rest) == windows


def test_another_seq_len_begins_a_new_epoch(data):
    with MixLoader(data, 4, 8, weights={"code": 1}) as loader:
        for _ in range(3):
            next(loader)
        state = loader.state_dict()
    with MixLoader(data, 1, 16, weights={"code": 1}) as loader:
        loader.load_state_dict(state)
        windows = int(loader.windows[1])
        starts = [int(next(loader)["input_ids"][0, 0]) & 0xFFFFF for _ in range(windows)]
        assert sorted(starts) == list(range(0, 16 * windows, 16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "other seed: 1; this loader has 0"),
        ({"fingerprint": "00"}, "other data: '00'"),
        ({"domains": ["web", "code", "law"]}, "other domains"),
        ({"version": 99}, "version 99"),
        ({"cursors": [1, 2]}, "damaged"),
        ({"cursors": [1, 2, -1]}, "damaged"),
        ({"residuals": [1, 0, 0]}, "damaged"),
        ({"residuals": [0.0, 0.0, 0.0]}, "damaged"),
        ({"step": 1.5}, "damaged"),
        ({"weights": [[0, 0, [1, 2, 3]]]}, "damaged"),
        ({"weights": []}, "damaged"),
    ],
)
def test_a_state_of_another_run_is_refused_and_changes_nothing(data, change, message):
    with MixLoader(data, 4, 8) as loader:
        next(loader)
        before = loader.state_dict()
        with pytest.raises(StateError, match=message):
            loader.load_state_dict({**before, **change})
        del before["residuals"]
        with pytest.raises(StateError, match="no 'residuals'"):
            loader.load_state_dict(before)
        assert next(loader)["step"] == 1


def test_a_state_inside_a_step_needs_micro_batches_that_fit(data):
    with MixLoader(data, 2, 8, grad_accumulation_steps=6) as loader:
        next(loader)
        state = loader.state_dict()
    with (
        MixLoader(data, 4, 8, grad_accumulation_steps=3) as loader,
        pytest.raises(StateError, match="2 rows into a step, which is no whole number of micro-batches of 4 rows"),
    ):
        loader.load_state_dict(state)


def test_a_global_batch_that_the_ranks_do_not_divide_is_refused(data):
    with pytest.raises(
        ValueError, match=r"30 rows cannot be dealt to 4 ranks in micro-batches of 4 rows.*multiple of 16"
    ):
        MixLoader(data, 4, 8, world_size=4, rank=0, global_batch=30)
    with MixLoader(data, 4, 8, world_size=2, rank=1, global_batch=24) as loader:
        assert loader.grad_accumulation_steps == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"seq_len": -1}, "seq_len is -1"),
        ({"rank": 2, "world_size": 2}, "rank is 2, but world_size is 2"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"prefetch_factor": 0}, "prefetch_factor is 0"),
        ({"max_steps": -1}, "max_steps is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1 << 64}, "in 64 bits"),
        ({"grad_accumulation_steps": True}, "grad_accumulation_steps is True"),
    ],
)
def test_counts_out_of_range_are_refused(data, arguments, message):
    with pytest.raises(ValueError, match=message):
        MixLoader(data, **{"batch_size": 4, "seq_len": 8, **arguments})


def test_numpy_integers_are_integers(data):
    with MixLoader(data, np.int64(4), np.int32(8), seed=np.uint64(7), global_batch=np.int64(8)) as loader:
        state = json.loads(json.dumps(loader.state_dict()))
        assert next(loader)["input_ids"].shape == (4, 8)
    with MixLoader(data, 4, 8, seed=7, grad_accumulation_steps=2) as loader:
        assert loader.state_dict() == state


def test_rank_and_world_size_come_from_torch_distributed(data, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 2)
    with MixLoader(data, 2, 8, global_batch=12) as loader, MixLoader(data, 12, 8, world_size=1, rank=0) as whole:
        assert (loader.world_size, loader.rank, loader.grad_accumulation_steps) == (3, 2, 2)
        rows = next(whole)["input_ids"]
        assert torch.equal(next(loader)["input_ids"], rows[4:6])
        assert torch.equal(next(loader)["input_ids"], rows[10:12])


@pytest.mark.parametrize("name", ["collate_fn", "sampler", "dataset", "worker_init_fn", "batchsize"])
def test_arguments_that_cannot_be_honoured_are_refused_with_a_reason(data, name):
    with pytest.raises(TypeError, match=f"cannot honour {name}=: .+"):
        MixLoader(data, 4, 8, **{name: None})


def test_a_token_outside_the_vocabulary_raises_at_its_batch_and_loses_nothing(tmp_path):
    tokens = np.arange(100, dtype="<u2")
    tokens[57] = 50_000
    path = write_raw(tmp_path / "a.bin", tokens)
    with MixLoader({"a": path}, 1, 10, vocab_size=100) as loader:
        read = []
        with pytest.raises(TokenError, match=rf"{path} holds token id 50000 at token 57 \(byte 114\).*has 100 ids"):
            read.extend(loader)
        assert loader.state_dict()["cursors"] == [len(read)]
        with pytest.raises(TokenError):
            next(loader)
        tokens[57] = 57
        write_raw(path, tokens)
        rest = [next(loader) for _ in range(9 - len(read))]
    starts = sorted(int(batch["input_ids"][0, 0]) for batch in read + rest)
    assert starts == list(range(0, 90, 10))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_shard_cut_while_it_is_read_raises_at_its_batch(tmp_path, num_workers):
    path = write_llmc(tmp_path / "a.bin", tagged(0, 1001))
    with MixLoader({"a": path}, 1, 10, num_workers=num_workers) as loader:
        for _ in range(20):
            next(loader)
        os.truncate(path, 1024 + 4 * 100)
        with pytest.raises(ShardError, match=rf"{path} ends at byte \d+.*truncated"):
            deque(loader, maxlen=0)


def test_a_shard_removed_before_it_is_read_raises(tmp_path):
    path = write_llmc(tmp_path / "a.bin", tagged(0, 101))
    with MixLoader({"a": path}, 1, 10) as loader:
        path.unlink()
        with pytest.raises(ShardError, match=f"cannot open shard {path}: No such file"):
            next(loader)


def test_a_domain_shorter_than_a_window_is_refused(tmp_path):
    data = tagged_domains(tmp_path, {"long": [100], "short": [8, 5]})
    with pytest.raises(ManifestError, match=r"'short' has no shard of 9 tokens.*longest has 8"):
        MixLoader(data, 1, 8)


def test_more_shards_than_descriptors(tmp_path):
    import resource

    data = tagged_domains(tmp_path, {"many": [20] * 400})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (320, hard))
    try:
        with MixLoader(data, 40, 10) as loader:
            starts = [int(t) & 0xFFFFF for _ in range(10) for t in next(loader)["input_ids"][:, 0]]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sorted(starts) == list(range(0, 8000, 20))


def test_close_ends_the_threads_and_the_loader(data):
    before = set(os.listdir("/proc/self/task"))
    loader = MixLoader(data, 4, 8, num_workers=3)
    next(loader)
    assert len(set(os.listdir("/proc/self/task")) - before) == 3
    loader.close()
    loader.close()
    assert not set(os.listdir("/proc/self/task")) - before
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)
    MixLoader(data, 4, 8, num_workers=3)
    gc.collect()
    assert not set(os.listdir("/proc/self/task")) - before


def test_weights_may_change_from_other_threads_while_batches_are_drawn(data):
    """Whatever the timing, each step's rows are those of the weights in force at it."""
    with MixLoader(data, 4, 8, num_workers=2, max_steps=300) as loader:
        stop = threading.Event()

        def change(seed):
            rng = np.random.default_rng(seed)
            while not stop.is_set():
                loader.set_weights(np.eye(3)[rng.integers(3)])

        threads = [threading.Thread(target=change, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        mixed = 0
        for batch in loader:
            mixed += len(set(batch["domain_ids"].tolist())) > 1
        stop.set()
        for thread in threads:
            thread.join()
    assert mixed <= 1, "only the first step, before any change, may hold several domains"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_threads_that_draw_together_get_each_batch_once(data, num_workers):
    with MixLoader(data, 4, 8, seed=3, max_steps=400, num_workers=num_workers) as loader:
        expected = {batch["step"]: batch["input_ids"] for batch in loader}
    drawn = []
    with MixLoader(data, 4, 8, seed=3, max_steps=400, num_workers=num_workers) as loader:
        threads = [threading.Thread(target=lambda: drawn.extend(loader)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(batch["step"] for batch in drawn) == sorted(expected)
    assert all(torch.equal(batch["input_ids"], expected[batch["step"]]) for batch in drawn)


def run_python(code, *arguments, timeout=60):
    """A scenario that may hang or crash, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_a_forked_child_gets_an_error_and_hangs_nobody(tmp_path):
    path = write_llmc(tmp_path / "a.bin", tagged(0, 1001))
    result = run_python(
        """
        import os, sys
        from mixloader import MixLoader
        loader = MixLoader({"a": sys.argv[1]}, 1, 10, num_workers=2)
        next(loader)
        child = os.fork()
        if child == 0:
            try:
                next(loader)
            except RuntimeError as error:
                print(error, flush=True)
            loader.close()
            sys.exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        print(next(loader)["step"])
        """,
        path,
    )
    assert result.stdout.splitlines()[0].startswith("this loader was made in another process")
    assert result.stdout.splitlines()[1:] == ["7", "1"], result.stderr


def test_the_interpreter_exits_while_readers_run(tmp_path):
    path = write_llmc(tmp_path / "a.bin", tagged(0, 1001))
    result = run_python(
        """
        import sys
        from mixloader import MixLoader
        loader = MixLoader({"a": sys.argv[1]}, 8, 10, num_workers=2)
        next(loader)
        """,
        path,
    )
    assert (result.returncode, result.stderr) == (0, "")
