"""A loop of accelerate's on mixloader: `python examples/accelerate_script.py DATA OUT [STEPS]`; the same again goes on.

DATA as for huggingface.py. The loader is not prepared: it deals the rows to the ranks itself.
"""

import shutil
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import GPT2Config, GPT2LMHeadModel

from mixloader import Manifest, Mixer, MixLoader, domain_cross_entropy

data, out, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 1000
every = 4  # steps from one checkpoint to the next
set_seed(1)
accelerator = Accelerator(gradient_accumulation_steps=2)
vocab_size = Manifest.open(data).vocab_size
model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_positions=64, n_embd=64, n_layer=2, n_head=2))
loader = MixLoader(
    data,
    4,
    64,
    grad_accumulation_steps=2,
    world_size=accelerator.num_processes,
    rank=accelerator.process_index,
    vocab_size=vocab_size,
    max_steps=steps,
)
mixer = Mixer(loader, policy="agent", device=accelerator.device, record=out / "record.jsonl")
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
accelerator.register_for_checkpointing(loader, mixer)  # in this order: a mixer's state belongs to a loader's
if checkpoints := sorted(out.glob("step-*")):
    accelerator.load_state(str(checkpoints[-1]))

for batch in loader:
    x, y, domains = (batch[key].to(accelerator.device) for key in ("input_ids", "targets", "domain_ids"))
    with accelerator.accumulate(model):
        loss = domain_cross_entropy(model(x).logits, y, domains, stats=mixer.stats)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    if not accelerator.sync_gradients:
        continue
    mixer.step()
    if loader.step % every == 0:
        accelerator.save_state(str(out / "next"))
        if accelerator.is_main_process:
            old = list(out.glob("step-*"))
            (out / "next").rename(out / f"step-{loader.step:06d}")  # now it is whole
            for path in old:
                shutil.rmtree(path)
        accelerator.wait_for_everyone()

accelerator.save_model(model, str(out))
mixer.close()
loader.close()
