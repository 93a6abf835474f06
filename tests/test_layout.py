"""Ranks: from a device mesh, and what they read together."""

import subprocess
import sys
import textwrap

import pytest
import torch
from corpora import tagged_domains

from mixloader import MixLoader
from mixloader.layout import mesh_ranks


class Mesh:
    """A DeviceMesh as one rank of it sees it."""

    def __init__(self, dims, coordinates):
        self.mesh_dim_names, self._sizes = tuple(dims), list(dims.values())
        self._coordinates = dict(zip(dims, coordinates, strict=True))

    def size(self, dim):
        return self._sizes[dim]

    def get_local_rank(self, name):
        return self._coordinates[name]


@pytest.mark.parametrize(
    ("dims", "coordinates", "chosen", "expected"),
    [
        ({"dp": 4, "tp": 2}, (3, 1), None, (4, 3)),
        ({"pp": 2, "dp_replicate": 2, "dp_shard": 3, "cp": 2, "tp": 2}, (1, 1, 2, 0, 1), None, (6, 5)),
        ({"a": 2, "b": 3}, (1, 2), ["b"], (3, 2)),
        ({"tp": 4}, (2,), [], (1, 0)),
    ],
)
def test_only_data_dimensions_count(dims, coordinates, chosen, expected):
    assert mesh_ranks(Mesh(dims, coordinates), chosen) == expected


@pytest.mark.parametrize(("dims", "chosen"), [({"tp": 4}, None), ({"dp": 4}, ["x"])])
def test_a_mesh_without_such_a_dimension_is_refused(dims, chosen):
    with pytest.raises(ValueError, match="mesh_dims"):
        mesh_ranks(Mesh(dims, [0] * len(dims)), chosen)


def test_tensor_parallel_ranks_read_the_same_rows(tmp_path):
    data = tagged_domains(tmp_path, {"web": [700, 300], "code": [400]})
    with MixLoader(data, 4, 8, max_steps=5) as whole:
        expected = torch.stack([batch["input_ids"] for batch in whole])
    for dp in range(2):
        for tp in range(2):
            with MixLoader(data, 2, 8, max_steps=5, mesh=Mesh({"dp": 2, "tp": 2}, (dp, tp))) as loader:
                rows = torch.stack([batch["input_ids"] for batch in loader])
            assert torch.equal(rows, expected[:, 2 * dp : 2 * dp + 2])


def test_a_mesh_and_ranks_contradict_each_other(tmp_path):
    data = tagged_domains(tmp_path, {"web": [700]})
    with pytest.raises(ValueError, match="not both"):
        MixLoader(data, 2, 8, mesh=Mesh({"dp": 2}, (0,)), rank=0)


def test_a_real_device_mesh(tmp_path):
    """Four gloo processes in a 2 x 2 mesh."""
    script = textwrap.dedent(
        """
        import sys, torch.distributed as dist, torch.multiprocessing as mp
        from torch.distributed.device_mesh import init_device_mesh
        from mixloader.layout import mesh_ranks

        def run(rank, store):
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=4)
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "tp"))
            assert mesh_ranks(mesh) == (2, rank // 2), mesh_ranks(mesh)
            dist.destroy_process_group()

        if __name__ == "__main__":
            mp.spawn(run, (sys.argv[1],), nprocs=4)
        """
    )
    program = tmp_path / "mesh.py"
    program.write_text(script)
    done = subprocess.run(
        [sys.executable, program, tmp_path / "store"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_loader_made_before_the_process_group_under_torchrun_is_refused(tmp_path, monkeypatch):
    """Each process would take itself for the only one, and all would train on the same rows."""
    data = tagged_domains(tmp_path, {"web": [700]})
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="torchrun has started 2 processes, but torch"):
        MixLoader(data, 4, 8)
    for ranks in ({"world_size": 1}, {"world_size": 2, "rank": 1}):
        with MixLoader(data, 4, 8, num_workers=0, **ranks) as loader:
            assert loader.world_size == ranks["world_size"]
