"""Guidance by a reward's gradient, for any scheduler whose noisy latents are x = alpha x0 + sigma n; pure.

A network estimates the noise n of x, and with it the clean latent x0. Classifier guidance ("Diffusion models beat
GANs on image synthesis", Dhariwal & Nichol 2021, arXiv 2105.05233, algorithm 2) moves the estimate by the gradient of a
log-likelihood; universal guidance ("Universal guidance for diffusion models", Bansal et al. 2023, arXiv 2302.07121,
eq. 6) takes for it any function of the predicted clean picture, here a reward:

    n' = n - scale * sigma * grad_x reward(picture(x0(x)))

The product sigma * grad_x is the same whether x is scaled to unit variance (DDIM, DPM++) or not (Euler), so one formula
serves all schedulers; what is handed on to them is n' in the form in which their network predicts.

Shapes: B pictures, C latent channels, h x w the latent grid, S sampling steps.
"""

import inspect
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)

from rl.sde import PREDICTION_TYPES

SCHEDULES = ("constant", "falling", "rising")
NORMS = ("raw", "unit")
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
    "dpmpp": DPMSolverMultistepScheduler,
}
"""By what settings call them. Each is given one prediction a step, of one point of the path."""
_NOT_IMPLEMENTED = {(EulerAncestralDiscreteScheduler, "sample")}  # in diffusers


@dataclass(frozen=True)
class Guidance:
    """How a reward's gradient acts while sampling.

    Attributes:
        scale: 0 is no guidance. What it means depends on `norm`.
        norm: "raw": classifier guidance as it is written, the reward times `scale` being a log-likelihood. "unit": each
            picture's gradient is brought to a root mean square of 1, so that `scale` is the size of the push on a noise
            estimate whose own is 1, whatever the reward's units are.
        max_norm: the push's root mean square is never larger; None: no limit.
        schedule: how the scale goes over the window: "constant", "falling" to 0 behind it, "rising" from 0 before it.
        first, last: the steps that are guided, first <= step < last; `last` None: all behind `first`.
        recurrence: how often a guided step is taken again from its end, noised back to its start (Bansal et al.,
            section 3.3): the network sees what guidance made of the picture. Each costs a step.
        through_network: whether the gradient goes through the network, as written above; else the noise estimate counts
            as constant, grad_x = grad_x0 / alpha, which needs neither the network's graph nor its backward pass (as
            "Manifold preserving guided diffusion", He et al. 2023, arXiv 2311.16424, without its projection).
    """

    scale: float
    norm: str = "unit"
    max_norm: float | None = None
    schedule: str = "constant"
    first: int = 0
    last: int | None = None
    recurrence: int = 0
    through_network: bool = True

    def __post_init__(self):
        if not self.scale >= 0:
            raise ValueError(f"scale is {self.scale}; it must not be negative: to lower a reward, negate its weights")
        for name, value, valid in (("norm", self.norm, NORMS), ("schedule", self.schedule, SCHEDULES)):
            if value not in valid:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(valid)}")
        if self.max_norm is not None and not self.max_norm > 0:
            raise ValueError(f"max_norm is {self.max_norm}; it must be above 0, or left out")
        if self.recurrence < 0:
            raise ValueError(f"recurrence is {self.recurrence}; it must not be negative")

    def scales(self, steps: int) -> list[float]:
        """The scale at each of S steps, 0 outside the window.

        With scale 1, a window of the steps 1, 2, 3 out of 5 and "falling": [0, 1, 2/3, 1/3, 0].

        Raises:
            ValueError: the window does not lie within the steps, or is empty.
        """
        last = steps if self.last is None else self.last
        if not 0 <= self.first < last <= steps:
            raise ValueError(
                f"the window of guided steps, {self.first}:{last}, does not lie within the {steps} steps 0:{steps}"
            )
        length, scales = last - self.first, [0.0] * steps
        for place in range(length):
            share = {"constant": 1.0, "falling": 1 - place / length, "rising": (place + 1) / length}[self.schedule]
            scales[self.first + place] = self.scale * share
        return scales

    def push(self, gradient: torch.Tensor, level: "Level", scale: float) -> torch.Tensor:
        """What is subtracted from the noise estimate, (B, C, h, w); `gradient` is the reward's by x, of that shape."""
        if self.norm == "unit":
            size = _size(gradient)  # 0 where the reward does not depend on the picture: no push
            push = scale * level.share * torch.where(size > 0, gradient / size.clamp(min=1e-30), 0.0)
        else:
            push = scale * level.sigma * gradient
        if self.max_norm is not None:
            push = push * (self.max_norm / _size(push).clamp(min=1e-30)).clamp(max=1.0)
        return push


class Level(NamedTuple):
    """Noise level of a point of the sampling path, x = alpha x0 + sigma n."""

    alpha: float
    sigma: float

    @property
    def share(self) -> float:
        """The noise's share of the standard deviation of x, for latents of unit variance."""
        return self.sigma / (self.alpha**2 + self.sigma**2) ** 0.5


def make_scheduler(own, name: str | None):
    """The scheduler that settings call `name`, with the noise schedule of the pipeline's own; None: its own.

    Raises:
        ValueError: it cannot be guided; see `check_scheduler`.
    """
    if name is None or isinstance(own, SCHEDULERS[name]):
        check_scheduler(own)
        return own
    changes = {"clip_sample": False} if name == "ddim" else {}  # latents are not clipped; PNDM's config may not say so
    scheduler = SCHEDULERS[name].from_config(own.config, **changes)
    check_scheduler(scheduler)
    return scheduler


def check_scheduler(scheduler) -> None:
    """Complain about a scheduler that cannot be guided.

    Raises:
        ValueError: it is none of `SCHEDULERS`, or has settings that change its clean latent or its path.
    """
    name = type(scheduler).__name__
    if not isinstance(scheduler, tuple(SCHEDULERS.values())):
        known = ", ".join(f"{key} ({value.__name__})" for key, value in SCHEDULERS.items())
        raise ValueError(f"the scheduler {name} cannot be guided; set `scheduler` to one of {known}")
    config, own = scheduler.config, inspect.signature(type(scheduler)).parameters  # a config may hold another's too
    for key in ("thresholding", "clip_sample", "use_flow_sigmas"):
        if key in own and config[key]:
            raise ValueError(f"{name} with {key} cannot be guided: switch it off in the scheduler's config")
    known = [kind for kind in PREDICTION_TYPES if (type(scheduler), kind) not in _NOT_IMPLEMENTED]
    if config.prediction_type not in known:
        raise ValueError(
            f"{name} with prediction_type {config.prediction_type!r} cannot be guided; what can is {', '.join(known)}"
        )


def levels(scheduler) -> list[tuple[Level, Level]]:
    """The noise levels at which each step starts and ends, of a scheduler whose timesteps are set.

    A step ends where the next one starts, but for DDIM with timestep_spacing "linspace": diffusers ends its steps a
    fixed number of timesteps later, whatever the next timestep is.
    """
    check_scheduler(scheduler)
    if isinstance(scheduler, DDIMScheduler):
        starts = scheduler.timesteps.cpu()
        ends = starts - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        alphas = scheduler.alphas_cumprod
        after = torch.where(ends >= 0, alphas[ends.clamp(min=0)], scheduler.final_alpha_cumprod)
        return [
            tuple(Level(float(alpha) ** 0.5, float(1 - alpha) ** 0.5) for alpha in pair)
            for pair in zip(alphas[starts], after, strict=True)
        ]
    points = [Level(1.0, float(sigma)) for sigma in scheduler.sigmas]
    if isinstance(scheduler, DPMSolverMultistepScheduler):
        points = [Level(1 / (1 + sigma**2) ** 0.5, sigma / (1 + sigma**2) ** 0.5) for _, sigma in points]
    return list(pairwise(points))


def clean_and_noise(
    output: torch.Tensor, latents: torch.Tensor, level: Level, prediction_type: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """x0 and n, both (B, C, h, w), that a network's output says are in `latents`, x."""
    alpha, sigma = level
    if prediction_type == "epsilon":
        return (latents - sigma * output) / alpha, output
    if prediction_type == "v_prediction":  # v = (alpha n - sigma x0) / r, of x / r (Salimans & Ho 2022, appendix D)
        r = (alpha**2 + sigma**2) ** 0.5
        return (alpha * latents / r - sigma * output) / r, (sigma * latents / r + alpha * output) / r
    assert prediction_type == "sample", prediction_type
    return output, (latents - alpha * output) / sigma


def as_output(noise: torch.Tensor, latents: torch.Tensor, level: Level, prediction_type: str) -> torch.Tensor:
    """The network's output that says that `noise` n is in `latents`, x: the inverse of `clean_and_noise`."""
    alpha, sigma = level
    if prediction_type == "epsilon":
        return noise
    clean = (latents - sigma * noise) / alpha
    if prediction_type == "v_prediction":
        return (alpha * noise - sigma * clean) / (alpha**2 + sigma**2) ** 0.5
    assert prediction_type == "sample", prediction_type
    return clean


def noised_back(latents: torch.Tensor, end: Level, start: Level, noise: torch.Tensor) -> torch.Tensor:
    """`latents` at a step's end, with as much of `noise` (standard normal) added as brings them to its start."""
    ratio = start.alpha / end.alpha
    return ratio * latents + max(start.sigma**2 - (ratio * end.sigma) ** 2, 0.0) ** 0.5 * noise


def _size(values: torch.Tensor) -> torch.Tensor:
    """Root mean square of each picture's values, (B, 1, 1, 1)."""
    return values.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
