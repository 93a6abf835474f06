"""The example of torchtitan on a CPU, watched and perhaps killed: `python torchtitan_run.py DATA OUT STEPS DIE_AT`.

torchtitan is made for GPUs. What it asks torch.cuda for is put into torch.cpu here, and flex attention, which has no
backward pass on a CPU, is replaced by torch's own.
"""

import hashlib
import os
import signal
import socket
import sys
import types
from pathlib import Path

import torch
import torch._utils

ROOT = Path(__file__).parents[1]


def show_torchtitan_a_cpu() -> None:
    torch._utils._get_available_device_type = lambda: "cpu"
    torch.cpu.get_device_name = lambda device=None: "cpu"
    torch.cpu.get_device_properties = lambda device=None: types.SimpleNamespace(total_memory=1 << 34, name="cpu")
    torch.cpu.memory_stats = lambda device=None: {}
    torch.cpu.current_device = lambda: 0
    if not hasattr(torch.distributed, "set_timeout"):  # of a torch that is not released
        torch.distributed.set_timeout = lambda timeout, group: None
    torch.cpu.reset_peak_memory_stats = torch.cpu.empty_cache = lambda: None


def without_flex_attention() -> None:
    import with_torchtitan
    from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention

    real = with_torchtitan.model_registry

    def registry(flavor):
        spec = real(flavor)
        for _, _, parent, name in list(spec.model.traverse(FlexAttention.Config)):
            setattr(parent, name, ScaledDotProductAttention.Config())
        return spec

    with_torchtitan.model_registry = registry


def watch(out: str, die_at: int) -> None:
    """Write the digest of every micro-batch that is trained on; end in the middle of plan step `die_at`."""
    from mixloader.integrations.torchtitan import MixTrainer

    real = MixTrainer.post_dataloading_process

    def watched(self, input_dict, labels):
        digest = hashlib.sha256(input_dict["input"].numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
        with open(f"{out}.batches", "a") as file:
            print(self.step, digest, file=file, flush=True)
        if self.step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, input_dict, labels)

    MixTrainer.post_dataloading_process = watched


def main(data: str, out: str, steps: str, die_at: str) -> None:
    show_torchtitan_a_cpu()
    sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
    if "MASTER_PORT" not in os.environ:  # not under torchrun
        with socket.socket() as free:
            free.bind(("localhost", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    import with_torchtitan

    without_flex_attention()
    watch(out, int(die_at))
    with_torchtitan.main(data, out, int(steps))


if __name__ == "__main__":
    main(*sys.argv[1:])
