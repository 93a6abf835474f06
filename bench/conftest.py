"""Saved micro-benchmarks name hardware and versions as the other results do, not the host, and not every round."""

from bench.common import environment


def pytest_benchmark_generate_machine_info(config):
    return environment()


def pytest_benchmark_generate_commit_info(config):
    return {}


def pytest_benchmark_update_json(config, benchmarks, output_json):
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
