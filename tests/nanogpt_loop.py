"""A training script that calls things in the order in which nanoGPT's train.py calls them, with a model of its shape.

`python nanogpt_loop.py DATA OUT ITERATIONS ACCUMULATION POLICY scratch|resume`; after each iteration it appends a line
to OUT/seen.jsonl: the iteration and digests of its batches and of the parameters.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional

from mixloader.integrations.nanogpt import MixedBatches

EVERY = 4  # iterations from one evaluation and checkpoint to the next


class TinyGPT(nn.Module):
    """Causal, with blocks in an nn.ModuleList; gives all logits only where it is given targets, as nanoGPT's does."""

    def __init__(self, vocab_size: int = 50, width: int = 16):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size)
        self.wte = nn.Embedding(vocab_size, width)
        self.h = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.head = nn.Linear(width, vocab_size, bias=False)

    def forward(self, idx, targets=None):
        x = self.wte(idx)
        for block in self.h:
            x = x + block(functional.gelu(x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]))
        if targets is None:
            return self.head(x[:, [-1]]), None
        logits = self.head(x)
        return logits, functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def digest(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()[:16]


def main(data, out, iterations, accumulation, policy, how) -> nn.Module:
    torch.set_num_threads(1)
    torch.manual_seed(1337)
    model = TinyGPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    iteration, checkpoint = 0, None
    if how == "resume":
        checkpoint = torch.load(out / "ckpt.pt")
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        iteration = checkpoint["iteration"]
    get_batch = mix = MixedBatches(
        data,
        model,
        batch_size=4,
        block_size=16,
        gradient_accumulation_steps=accumulation,
        max_iters=iterations,
        eval_interval=EVERY,
        policy=policy,
        record=out / "record.jsonl",
        influence={"stride": 2, "probe_every": 2, "rank": 4} if policy == "influence" else None,
        state=checkpoint["mix"] if checkpoint else None,
    )

    @torch.no_grad()
    def estimate_loss() -> dict[str, float]:
        model.eval()
        losses = {split: sum(model(*get_batch(split))[1].item() for _ in range(3)) / 3 for split in ("train", "val")}
        model.train()
        return losses

    X, Y = get_batch("train")
    while True:
        losses = None
        if iteration % EVERY == 0:
            losses = estimate_loss()
            if iteration > 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iteration": iteration}
                torch.save(state | {"mix": mix.state_dict()}, out / "ckpt.tmp")
                (out / "ckpt.tmp").rename(out / "ckpt.pt")
        seen = []
        for _ in range(accumulation):
            logits, own = model(X, Y)
            loss = mix.loss(logits, Y) / accumulation
            seen.append((X.clone(), Y.clone(), own.item(), loss.item() * accumulation))
            X, Y = get_batch("train")
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mix.step()
        line = {
            "iteration": iteration,
            "batches": [digest(x, y) for x, y, _, _ in seen],
            "losses": [[own, ours] for _, _, own, ours in seen],
            "estimate": losses,
            "parameters": digest(*model.parameters()),
        }
        with open(out / "seen.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        iteration += 1
        if iteration > iterations:
            return model


def seen(out: Path) -> dict[int, dict]:
    """The last line of each iteration."""
    lines = [json.loads(line) for line in (out / "seen.jsonl").read_text().splitlines()]
    return {line["iteration"]: line for line in lines}


if __name__ == "__main__":
    data, out, iterations, accumulation, policy, how = sys.argv[1:]
    import tiny_run  # noqa: F401  registers the policy "chase"

    main(data, Path(out), int(iterations), int(accumulation), policy, how)
