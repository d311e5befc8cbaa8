"""The training loop behind every part that `tinyworld.build` makes: plain, resumable, and logged to a file.

The product's own trainings run on `transformers.Trainer`; these loops only make the small world's assets.
"""

import copy
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def fit(
    model: nn.Module,
    loss: Callable[[int], torch.Tensor],
    path: Path,
    *,
    steps: int,
    rate: float,
    warmup: int = 100,
    cooldown: float = 0.25,
    averaging: float = 0.999,
    slower: Iterable[nn.Parameter] = (),
    save_every: int = 500,
    report_every: int = 100,
    report: Callable[[int, nn.Module], dict] | None = None,
) -> nn.Module:
    """Train `model` by AdamW and return its exponential moving average; continues from `path` if that is there.

    Raises:
        ValueError: what is there is of a training of another length or rate.

    Args:
        loss: step number -> scalar loss. It draws its own batch from the step number, so that a resumed run sees
            the batches that an uninterrupted one would.
        path: the state is kept in this file (replaced atomically), the log beside it as `.jsonl`.
        rate: learning rate; linear warm-up over `warmup` steps, constant, then linear to zero over the last
            `cooldown` of the steps - so that a longer run can branch off before the cooldown.
        averaging: decay of the moving average.
        slower: parameters that learn at a fifth of the rate.
        report: called with the step and the averaged model at each save; what it returns goes to the log.
    """
    slow = {id(parameter) for parameter in slower}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in slow], "scale": 1.0},
        {"params": [p for p in model.parameters() if id(p) in slow], "scale": 0.2},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    schedule = {"steps": steps, "rate": rate}
    average, start = copy.deepcopy(model).requires_grad_(False), 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        was = state.get("schedule", schedule)  # older files do not say
        if was != schedule:
            raise ValueError(
                f"{path} is the state of a training of {was['steps']} steps at {was['rate']}, not of {steps} at "
                f"{rate}: take it away, or work in another folder"
            )
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    path.parent.mkdir(parents=True, exist_ok=True)
    model.train()
    began, total = time.perf_counter(), 0.0
    for step in range(start, steps):
        factor = min((step + 1) / warmup, 1.0, (steps - step) / max(cooldown * steps, 1))
        for group in optimizer.param_groups:
            group["lr"] = rate * factor * group["scale"]
        with sdpa_kernel(
            SDPBackend.MATH
        ):  # the fused attention's backward pass in bfloat16 on CPU was a third of a step
            value = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(averaging, (step + 1) / (step + 10))
        with torch.no_grad():
            old, new = list(average.parameters()), list(model.parameters())
            torch._foreach_lerp_(old, new, 1 - decay)
            for kept, buffer in zip(average.buffers(), model.buffers(), strict=True):
                kept.copy_(buffer)  # batch norms keep averages of their own
        total += value.item()
        done = step + 1
        if done % report_every == 0:
            line = {"step": done, "loss": total / report_every, "seconds": round(time.perf_counter() - began, 1)}
            total = 0.0
            if report and done % save_every == 0:
                line |= report(done, average)
            with path.with_suffix(".jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            print(path.stem, line, flush=True)
        if done % save_every == 0 or done == steps:
            beside = path.with_suffix(".part")
            torch.save(
                {
                    "model": model.state_dict(),
                    "average": average.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": done,
                    "schedule": schedule,
                },
                beside,
            )
            beside.replace(path)
    return average.eval()


def half_precision() -> torch.autocast:
    """bfloat16 on CPUs that compute in it; those that only imitate it are much faster in float32."""
    able = torch.cpu.get_capabilities()
    enabled = any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def keyed(*key: int) -> torch.Generator:
    """A random generator that depends on the key's numbers alone, not on what was drawn before."""
    seed = 0x9E3779B97F4A7C15
    for number in key:
        seed = (seed ^ (number + 0x9E3779B9 + (seed << 6) + (seed >> 2))) & 0x7FFFFFFFFFFFFFFF
    return torch.Generator().manual_seed(seed)
