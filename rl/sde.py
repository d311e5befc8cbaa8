"""One stochastic DDIM step as a distribution: its mean, its std, and the log-prob of where it went.

Shapes: B rows, C latent channels, h x w the latent grid, S sampling steps. All arithmetic is float32, or float64 where
it is given that.

The step from x_t to x_s (s < t; alpha the cumulative products of "Denoising Diffusion Implicit Models", Song et al.
2021, arXiv 2010.02502) is Gaussian with

    x0    = the network's estimate of the clean latent, eps its estimate of the noise
    std   = eta * sqrt((1 - alpha_s) / (1 - alpha_t)) * sqrt(1 - alpha_t / alpha_s)               (eq. 16)
    mean  = sqrt(alpha_s) * x0 + sqrt(1 - alpha_s - std^2) * eps                                   (eq. 12)

and DDPO ("Training Diffusion Models with Reinforcement Learning", Black et al. 2023, arXiv 2305.13301) treats it as the
action of a policy. Log-probs are kept per latent location: l(h, w) is the *mean over channels* of the log density; an
image's log-prob is the mean of l over (h, w).
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler

logger = logging.getLogger(__name__)

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
DISTILLED = ("LCMScheduler", "TCDScheduler")


@dataclass(frozen=True)
class Schedule:
    """The sampling steps, from noise to picture; step k goes from `timesteps[k]` to the next.

    Attributes:
        timesteps: (S,) int64, what the network is told, falling.
        alphas: (S,) float32, cumulative alpha at `timesteps`.
        next_alphas: (S,) float32, cumulative alpha at the step's end; 1 where the step ends in a clean latent.
        stds: (S,) float32, std of each step; 0 for a deterministic one.
        prediction_type: what the network predicts, one of `PREDICTION_TYPES`.
        clip_sample_range: the estimate of x0 is clamped to +- this; None if it is not clamped.
    """

    timesteps: torch.Tensor
    alphas: torch.Tensor
    next_alphas: torch.Tensor
    stds: torch.Tensor
    prediction_type: str
    clip_sample_range: float | None

    def __len__(self) -> int:
        return len(self.timesteps)


def ddim_scheduler(scheduler, start_timestep: int | None = None) -> DDIMScheduler:
    """The DDIM scheduler with the noise schedule of `scheduler`, any diffusers scheduler of a latent diffusion model.

    Args:
        scheduler: PNDM, Euler, DPM and the like are converted, and a log line says so.
        start_timestep: if given, the noise schedule is cut off behind it, so that sampling starts exactly there (with
            "trailing" spacing). Some schedules end where the network's prediction says nothing about the picture. The
            steps are even if `start_timestep + 1` is a multiple of the number of steps.

    Raises:
        ValueError: a scheduler of flow matching, without discrete betas or of betas that DDIM does not know, dynamic
            thresholding (the step would not be Gaussian around a mean that is reproducible from one latent's location),
            an unknown `prediction_type`, or a `start_timestep` outside the schedule.
    """
    config = dict(scheduler.config)
    name = type(scheduler).__name__
    if "num_train_timesteps" not in config or "beta_schedule" not in config:
        raise ValueError(
            f"{name} has no discrete noise schedule of betas, and cannot be turned into a stochastic DDIM step; "
            "use a pipeline trained with DDPM-type noise (Stable Diffusion 1.x and the like)"
        )
    if config.get("use_flow_sigmas") or config.get("timestep_type") == "continuous":
        setting = "use_flow_sigmas" if config.get("use_flow_sigmas") else "timestep_type: continuous"
        raise ValueError(
            f"{name} has {setting}, so its network was trained on other noise than DDPM's discrete steps, and a "
            "stochastic DDIM step would feed it what it does not know"
        )
    if not config.get("trained_betas") and config["beta_schedule"] not in BETA_SCHEDULES:
        raise ValueError(
            f"{name} has beta_schedule {config['beta_schedule']!r}, which is none of {', '.join(BETA_SCHEDULES)}; "
            "write its betas into the scheduler_config.json as `trained_betas`"
        )
    if config.get("thresholding"):
        raise ValueError(
            f"{name} uses dynamic thresholding, under which a step's log-prob cannot be computed; "
            "set `thresholding` to false in the pipeline's scheduler_config.json"
        )
    if config.get("prediction_type", "epsilon") not in PREDICTION_TYPES:
        raise ValueError(
            f"{name} has prediction_type {config['prediction_type']!r}, which is none of {', '.join(PREDICTION_TYPES)}"
        )
    changes = {}
    if not isinstance(scheduler, DDIMScheduler):
        # DDIM's default is to clip, which is wrong for latents; a scheduler without the option never clipped.
        changes["clip_sample"] = config.get("clip_sample", False)
        logger.warning("the pipeline's %s is converted to DDIM: only its steps are Gaussian with a known std", name)
        if name in DISTILLED:
            logger.warning("%s is for networks that were distilled to its few steps; others suit them badly", name)
    if start_timestep is not None:
        total = config["num_train_timesteps"]
        if not 0 < start_timestep < total:
            raise ValueError(f"start_timestep is {start_timestep}; it must lie between 1 and {total - 1}")
        if config.get("timestep_spacing", "leading") != "trailing":
            logger.warning(
                "start_timestep=%d changes timestep_spacing from %s to trailing, the one that starts at its end",
                start_timestep,
                config.get("timestep_spacing", "leading"),
            )
        betas = DDIMScheduler.from_config(scheduler.config, **changes).betas[: start_timestep + 1]
        changes |= {
            "num_train_timesteps": start_timestep + 1,
            "trained_betas": betas.tolist(),
            "timestep_spacing": "trailing",
            "rescale_betas_zero_snr": False,  # the betas already are
        }
    return DDIMScheduler.from_config(scheduler.config, **changes)


def make_schedule(
    scheduler: DDIMScheduler, num_inference_steps: int, eta: float, sde_window: str | None = None
) -> Schedule:
    """The steps that `scheduler` takes in `num_inference_steps`, each with the std it has at `eta` in [0, 1].

    They are exactly the steps of `DDIMScheduler.step`, its rule for where a step ends included.

    Args:
        sde_window: "first:end"; steps outside it are deterministic, as if `eta` were 0 ("MixGRPO", Li et al. 2025,
            arXiv 2507.21802, for flow models). None: none are.

    Raises:
        ValueError: `eta` outside [0, 1], more steps than the noise schedule has, a window that holds no step, or a
            prediction of noise where there is nothing else.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it must lie in [0, 1]: 0 is deterministic DDIM, 1 is DDPM's noise")
    total = scheduler.config.num_train_timesteps
    if not 1 <= num_inference_steps <= total:
        raise ValueError(f"num_inference_steps is {num_inference_steps}; it must lie between 1 and {total}")
    scheduler.set_timesteps(num_inference_steps)
    timesteps = scheduler.timesteps.long()
    ends = timesteps - total // num_inference_steps
    alphas = scheduler.alphas_cumprod[timesteps].float()
    if scheduler.config.prediction_type == "epsilon" and alphas[0] == 0:
        raise ValueError(
            f"sampling starts at timestep {int(timesteps[0])} in pure noise (zero terminal SNR), where a network of "
            "prediction_type epsilon says nothing about the picture; set start_timestep below it, or use a pipeline "
            "of prediction_type v_prediction"
        )
    next_alphas = torch.where(ends >= 0, scheduler.alphas_cumprod[ends.clamp(min=0)], scheduler.final_alpha_cumprod)
    variances = (1 - next_alphas) / (1 - alphas) * (1 - alphas / next_alphas)
    etas = torch.full((num_inference_steps,), float(eta))
    if sde_window is not None:
        inside = _window(sde_window, num_inference_steps, "sde_window")
        etas[: inside.start], etas[inside.stop :] = 0.0, 0.0
    return Schedule(
        timesteps=timesteps,
        alphas=alphas,
        next_alphas=next_alphas.float(),
        stds=etas * variances.clamp(min=0).sqrt().float(),
        prediction_type=scheduler.config.prediction_type,
        clip_sample_range=scheduler.config.clip_sample_range if scheduler.config.clip_sample else None,
    )


def resolve_train_steps(spec: str | int | Sequence[str | int], schedule: Schedule) -> tuple[int, ...]:
    """Which steps are trained: indices into the schedule, 0 the noisiest, in rising order.

    Args:
        spec: `"all"` (every step that has noise), a window `"1:3"` (steps 1 and 2), or a list such as `[1, 2]`.

    Raises:
        ValueError: not understood, out of range, or a step without noise, which has no log-prob.
    """
    parts = [str(part).strip() for part in ([spec] if isinstance(spec, str | int) else spec)]
    stochastic = [step for step in range(len(schedule)) if schedule.stds[step] > 0]
    if not stochastic:
        raise ValueError("no sampling step has noise, so there is nothing to train; set eta above 0")
    steps: set[int] = set()
    for part in parts:
        try:
            if part == "all":
                steps.update(stochastic)
            elif ":" in part:
                first, _, end = part.partition(":")
                steps.update(range(int(first or 0), int(end) if end else stochastic[-1] + 1))
            else:
                steps.add(int(part))
        except ValueError:
            raise ValueError(
                f"train_steps {part!r} is not understood; write `all`, a window such as `1:3`, or a list such as [1, 2]"
            ) from None
    if not steps:
        raise ValueError(f"train_steps {spec!r} names no step")
    for step in sorted(steps):
        if not 0 <= step < len(schedule):
            raise ValueError(f"train_steps names step {step}; the {len(schedule)} steps are 0 to {len(schedule) - 1}")
        if step not in stochastic:
            raise ValueError(
                f"train_steps names step {step}, which is deterministic (std 0) and has no log-prob; "
                f"steps with noise: {stochastic[0]} to {stochastic[-1]}"
            )
    return tuple(sorted(steps))


def _window(text: str, steps: int, setting: str) -> range:
    """The steps of a window such as "1:3", of `steps` in all."""
    first, colon, end = str(text).partition(":")
    try:
        window = range(int(first or 0), int(end) if end else steps)
    except ValueError:
        window = range(0)
    if not colon or not 0 <= window.start < window.stop <= steps:
        raise ValueError(
            f"{setting} is {text!r}; write a window of the {steps} steps such as `1:3`, which is steps 1, 2"
        )
    return window


def slide_window(text: str, rollout: int, interval: int, stride: int, steps: int, noisy: int) -> str:
    """Where the window "first:end" is in rollout number `rollout`: it moves by `stride` steps towards the picture every
    `interval` rollouts, until it reaches the last step with noise, and stays there ("MixGRPO", Li et al. 2025, arXiv
    2507.21802, algorithm 1).

    Example: "0:3" of ten steps of which nine have noise, `interval` 2 and `stride` 1, is 0:3, 0:3, 1:4, 1:4, 2:5, ...

    Args:
        steps: sampling steps in all.
        noisy: so many of them, the first ones, have noise.

    Raises:
        ValueError: the window holds no step, or one without noise.
    """
    window = _window(text, steps, "sde_window")
    if window.stop > noisy:
        raise ValueError(
            f"sde_window is {text!r}, but only the first {noisy} of the {steps} steps have noise, and a window that "
            f"slides keeps its size; let it end at {noisy} at most"
        )
    moved = min(stride * (rollout // interval), noisy - window.stop)
    return f"{window.start + moved}:{window.stop + moved}"


def step_weights(weighting: str, schedule: Schedule, steps: Sequence[int]) -> torch.Tensor:
    """What the loss of each trained step is multiplied by: (K,) float32 of mean 1.

    Args:
        weighting: "uniform"; "std": as the step's std, for a noisier step explores further (the noise-aware weighting
            of "TempFlow-GRPO", He et al. 2025, arXiv 2508.04324).
        steps: the K trained steps.
    """
    stds = schedule.stds[torch.as_tensor(list(steps))]
    return torch.ones_like(stds) if weighting == "uniform" else stds / stds.mean()


def draw_steps(steps: Sequence[int], fraction: float, generator: torch.Generator) -> tuple[int, ...]:
    """A random `fraction` of the trained steps, at least one, rounded up, in rising order."""
    count = math.ceil(fraction * len(steps) - 1e-9)
    return tuple(sorted(steps[place] for place in torch.randperm(len(steps), generator=generator)[:count].tolist()))


def predicted_x0_and_noise(
    output: torch.Tensor, latents: torch.Tensor, alphas: torch.Tensor, prediction_type: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a network's output (B, C, h, w) says of the clean latent and of the noise in `latents`.

    Args:
        alphas: (B, 1, 1, 1) cumulative alpha of each row.

    Returns:
        x0 and noise, both (B, C, h, w).
    """
    signal, noise_level = alphas.sqrt(), (1 - alphas).sqrt()
    if prediction_type == "epsilon":
        return (latents - noise_level * output) / signal, output
    if prediction_type == "v_prediction":  # "Progressive distillation", Salimans & Ho 2022, appendix D
        return signal * latents - noise_level * output, signal * output + noise_level * latents
    assert prediction_type == "sample", prediction_type
    return output, (latents - signal * output) / noise_level


def step_mean(
    output: torch.Tensor, latents: torch.Tensor, step_index: torch.Tensor, schedule: Schedule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std of the step that a network's output asks for.

    Args:
        output: (B, C, h, w), of the schedule's prediction type.
        latents: (B, C, h, w), x_t.
        step_index: (B,) int64, which step of the schedule each row is at.

    Returns:
        mean (B, C, h, w) and std (B, 1, 1, 1), float32.
    """
    alphas = _per_row(schedule.alphas, step_index, latents)
    next_alphas = _per_row(schedule.next_alphas, step_index, latents)
    stds = _per_row(schedule.stds, step_index, latents)
    output, latents = at_least_float32(output), at_least_float32(latents)
    x0, noise = predicted_x0_and_noise(output, latents, alphas, schedule.prediction_type)
    if schedule.clip_sample_range is not None:
        x0 = x0.clamp(-schedule.clip_sample_range, schedule.clip_sample_range)
    direction = (1 - next_alphas - stds**2).clamp(min=0).sqrt()
    return next_alphas.sqrt() * x0 + direction * noise, stds


def log_prob_map(next_latents: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """l(h, w): log density of `next_latents` (B, C, h, w) under N(mean, std^2), averaged over channels -> (B, h, w)."""
    density = -((next_latents - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return density.mean(dim=1)


def kl_map(mean: torch.Tensor, reference_mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """KL divergence of two Gaussian steps of the same std, exact, averaged over channels: (B, C, h, w) -> (B, h, w)."""
    return ((mean - reference_mean) ** 2 / (2 * std**2)).mean(dim=1)


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision as float32, anything else as it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _per_row(values: torch.Tensor, step_index: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.to(like.device)[step_index].view(-1, 1, 1, 1)
