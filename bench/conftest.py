"""Saved micro-benchmarks name hardware and versions as the other results do, and not the host."""

from bench.common import environment


def pytest_benchmark_generate_machine_info(config):
    return environment()


def pytest_benchmark_generate_commit_info(config):
    return {}
