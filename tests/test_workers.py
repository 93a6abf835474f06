"""Workers: what becomes of jobs that raise, of processes that die and of those that are no longer wanted."""

import math
import signal
import sys
import time

import pytest

from mixloader.compare.suite import Suite
from mixloader.errors import ConfigError
from mixloader.workers import attempt, make_workers


def run_all(function, jobs, count, engine="local"):
    with make_workers(function, count, engine) as workers:
        return list(workers.run(jobs))


def test_a_process_that_dies_ends_its_job_alone():
    outcomes = {outcome.index: outcome for outcome in run_all(signal.raise_signal, [0, 9, 0], 1)}
    assert [outcomes[i].error for i in range(3)] == [None, "its process was killed by signal 9", None]


def test_a_job_that_raises_ends_alone_and_a_mistake_of_the_users_keeps_its_sentence(capfd):
    outcomes = {outcome.index: outcome for outcome in run_all(math.sqrt, [4.0, -1.0, 9.0], 1)}
    assert (outcomes[0].value, outcomes[2].value) == (2.0, 3.0)
    assert outcomes[1].error.startswith("ValueError: ")
    assert "Traceback" in capfd.readouterr().err
    assert attempt(Suite.load, 0, "/nowhere.yaml").error.startswith("cannot read the config /nowhere.yaml")


def test_workers_end_with_their_user_also_in_the_middle_of_a_job():
    with make_workers(time.sleep, 2) as workers:
        running = workers.run([0, 600, 600])
        assert next(running).index == 0
        processes = [worker.process for worker in (*workers._busy.values(), *workers._idle)]
        assert len(processes) == 2
    assert not any(process.is_alive() for process in processes)


def test_the_engine_and_its_package_are_named():
    with pytest.raises(ConfigError, match="engine is 'slurm'; expected one of 'local', 'ray'"):
        make_workers(math.sqrt, 1, "slurm")
    with pytest.raises(ConfigError, match="workers is 0"):
        make_workers(math.sqrt, 0)


def test_a_missing_ray_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r'pip install "mixloader\[ray\]"'):
        make_workers(math.sqrt, 1, "ray")


def test_ray_gives_the_same_outcomes():
    pytest.importorskip("ray", reason="ray is not installed (pip install 'mixloader[ray]')")
    found = {o.index: o for o in run_all(math.sqrt, [4.0, -1.0, 9.0], 2, "ray")}
    assert (found[0].value, found[2].value) == (2.0, 3.0)
    assert found[1].error.startswith("ValueError")
