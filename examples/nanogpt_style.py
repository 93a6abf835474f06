"""A nanoGPT-style training loop on mixloader: `python examples/nanogpt_style.py DATA [STEPS]`.

DATA is a manifest.json whose domains have a field ("source" to keep, "target" to learn), as
`python -m mixloader pack DATA prose=texts/ maths=problems/ --target maths` writes it.
"""

import sys

import torch

from mixloader import Mixer, MixLoader, domain_cross_entropy
from mixloader.config import ModelConfig
from mixloader.train.model import build_model

data, steps = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1000
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(1337)

loader = MixLoader(data, batch_size=12, seq_len=64, seed=1337, max_steps=steps, pin_memory=device == "cuda")
mixer = Mixer(loader, policy="agent", device=device, record="record.jsonl")
model = build_model(ModelConfig(vocab_size=loader.vocab_size or 50304, seq_len=64, n_layer=4, n_embd=128)).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)

for batch in loader:
    x, y, domains = (batch[key].to(device, non_blocking=True) for key in ("input_ids", "targets", "domain_ids"))
    logits = model(x)
    loss = domain_cross_entropy(logits, y, domains, stats=mixer.stats)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    mixer.step()  # the losses of this step decide the mixture of a later one
    if batch["step"] % 10 == 0:
        mixture = ", ".join(f"{name} {weight:.0%}" for name, weight in zip(loader.names, loader.weights, strict=True))
        print(f"step {batch['step']}: loss {loss.item():.3f} mixture {mixture}")

mixer.close()
loader.close()
