"""FSDP2 and torch.distributed.checkpoint: `torchrun --nproc-per-node 2 examples/fsdp2.py DATA [STEPS [CHECKPOINTS]]`.

DATA is a manifest.json as for nanogpt_style.py. With a folder for CHECKPOINTS the run is saved at its end, and the same
command with more STEPS goes on from there, on any number of ranks that the global batch can be dealt to.
"""

import glob
import os
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mixloader import Mixer, MixLoader, domain_cross_entropy
from mixloader.config import ModelConfig
from mixloader.influence import Influence
from mixloader.saved import SavedRun
from mixloader.train.model import build_model

GLOBAL_BATCH = 16  # rows of an optimizer step, over all ranks

data, steps = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1000
folder = sys.argv[3] if len(sys.argv) > 3 else None
cuda = torch.cuda.is_available()
device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu")
if cuda:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if cuda else "gloo")
mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("fsdp",))
torch.manual_seed(1337)

rows = GLOBAL_BATCH // dist.get_world_size()
loader = MixLoader(data, batch_size=rows, seq_len=64, seed=1337, mesh=mesh)
model = build_model(ModelConfig(vocab_size=loader.vocab_size or 50304, seq_len=64, n_layer=4, n_embd=128)).to(device)
for block in model.h:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
mixer = Mixer(loader, policy="influence", device=device, influence=Influence(model))
run = SavedRun(loader, mixer)

latest = max(glob.glob(f"{folder}/step-*"), default=None)
if latest is not None:
    parameters, moments = get_state_dict(model, optimizer)
    dcp.load({"model": parameters, "optimizer": moments, "run": run}, checkpoint_id=latest)
    set_state_dict(model, optimizer, model_state_dict=parameters, optim_state_dict=moments)

while loader.step < steps:
    batch = next(loader)
    x, y, domains = (batch[key].to(device, non_blocking=True) for key in ("input_ids", "targets", "domain_ids"))
    loss = domain_cross_entropy(model(x), y, domains, stats=mixer.stats)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    mixer.step()
    if batch["step"] % 10 == 0 and dist.get_rank() == 0:
        mixture = ", ".join(f"{name} {weight:.0%}" for name, weight in zip(loader.names, loader.weights, strict=True))
        print(f"step {batch['step']}: loss on rank 0 {loss.item():.3f} mixture {mixture}")

if folder is not None:
    parameters, moments = get_state_dict(model, optimizer)
    states = {"model": parameters, "optimizer": moments, "run": run}
    dcp.save(states, checkpoint_id=f"{folder}/step-{steps:06d}")
mixer.close()
loader.close()
dist.destroy_process_group()
