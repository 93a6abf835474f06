"""The simulator's equations in torch, written from its docstring: an independent reference for tests."""

import torch

DIFFERENTIABLE = (
    "start", "gain", "knee", "power", "level", "rate", "hold", "transfer", "similar", "relearn", "wear",
)  # fmt: skip


def held_out(episodes, weights, parts):
    """Held-out losses [B, T + 1, D] of float64 weights [B, T, D], integrated in `parts` parts a step.

    episodes: a mapping from the names of Episodes to float64 tensors.
    """
    e, steps = episodes, weights.shape[1]
    dt = 1 / (steps * parts)
    learned, read = torch.zeros_like(weights[:, 0]), torch.zeros_like(weights[:, 0])
    forgotten = torch.zeros_like(e["level"])
    out = [e["start"]]
    for part in range(steps * parts):
        w, p = weights[:, part // parts], (part + 0.5) * dt
        falling = e["lr_end"] + (1 - e["lr_end"]) * 0.5 * (
            1 + torch.cos(torch.pi * (p - e["warmup"]).clamp_min(0) / (1 - e["warmup"]))
        )
        lr = torch.minimum(p / e["warmup"].clamp_min(1e-6), falling)[:, None]
        fresh = torch.exp(-(read / e["tokens"] - 1).clamp_min(0) / e["wear"][:, None])
        practice = torch.einsum("bij,bj->bi", e["similar"], w).clamp(max=1)
        reduction = e["gain"] * (1 - (1 + learned / e["knee"]) ** -e["power"])
        relearned = e["relearn"][:, None] * reduction
        level = e["level"] + torch.stack([relearned, torch.zeros_like(relearned)], -1)
        pull = 1 - practice + e["hold"] * practice
        rest = level * ((1 - practice) / pull)[..., None]
        forgotten = rest + (forgotten - rest) * torch.exp(-e["rate"] * (lr * pull * dt)[..., None])
        learned = learned + lr * torch.einsum("bij,bj->bi", e["transfer"], w * fresh) * dt
        read = read + w * dt
        if (part + 1) % parts == 0:
            reduction = e["gain"] * (1 - (1 + learned / e["knee"]) ** -e["power"])
            out.append(e["start"] - reduction + forgotten.sum(-1))
    return torch.stack(out, 1)


def tensors(episodes, gradients=()):
    """The numbers of Episodes for `held_out`, those named in `gradients` leaves that want them.

    Padding gets harmless values.
    """
    out = {}
    for name, array in episodes._asdict().items():
        out[name] = torch.from_numpy(array.astype("float64"))
        if name in ("tokens", "knee", "power", "hold"):
            out[name] = torch.where(out[name] == 0, torch.ones(()).double(), out[name])
        out[name].requires_grad_(name in gradients)
    return out
