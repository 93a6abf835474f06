"""DDP: `torchrun --nproc-per-node 2 examples/ddp.py DATA [STEPS]`, on GPUs or on a CPU.

DATA is a manifest.json as for nanogpt_style.py. What is not in a script for one process is marked with ranks.
"""

import os
import sys
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mixloader import Mixer, MixLoader, domain_cross_entropy
from mixloader.config import ModelConfig
from mixloader.train.model import build_model

data, steps = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1000
cuda = torch.cuda.is_available()
device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu")  # ranks
if cuda:
    torch.cuda.set_device(device)  # ranks
dist.init_process_group("nccl" if cuda else "gloo")  # ranks
torch.manual_seed(1337)

# batch_size is of one rank; world size and rank are those of torch.distributed.
loader = MixLoader(data, batch_size=4, seq_len=64, grad_accumulation_steps=2, seed=1337, max_steps=steps)
mixer = Mixer(loader, policy="agent", device=device, record="record.jsonl")  # the same call on every rank
model = build_model(ModelConfig(vocab_size=loader.vocab_size or 50304, seq_len=64, n_layer=4, n_embd=128)).to(device)
model = DistributedDataParallel(model, [device] if cuda else None)  # ranks
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)

for batch in loader:
    last = batch["micro_step"] == loader.grad_accumulation_steps - 1
    x, y, domains = (batch[key].to(device, non_blocking=True) for key in ("input_ids", "targets", "domain_ids"))
    with nullcontext() if last else model.no_sync():  # ranks
        loss = domain_cross_entropy(model(x), y, domains, stats=mixer.stats)
        (loss / loader.grad_accumulation_steps).backward()
    if not last:
        continue
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    mixer.step()  # the losses of all ranks decide the mixture of a later step, on all ranks
    if batch["step"] % 10 == 0 and dist.get_rank() == 0:
        mixture = ", ".join(f"{name} {weight:.0%}" for name, weight in zip(loader.names, loader.weights, strict=True))
        print(f"step {batch['step']}: loss on rank 0 {loss.item():.3f} mixture {mixture}")

mixer.close()
loader.close()
dist.destroy_process_group()  # ranks
