"""Which sampling steps are worth training, and which kind of credit: signal and noise of each policy gradient.

    python benchmarks/gradient_snr.py [--config configs/ddpo_tinyworld.yaml] [--chunks 48] [--steps 1 2 3]
                                      [--credits image paid] [--quick] [--json FILE]

The policy is the config's, untrained. Chunks of 64 pictures of disjoint prompts are drawn, and for each sampling step
and each kind of credit (`rl/credit.py`) the gradient g of the first pass' loss is taken, from the same pictures.
Gradients of two chunks share their expectation and nothing else, so that without bias

- |E g|^2 is the mean of their inner products, the noise of one chunk the mean of |g|^2 less that. Printed is the root
  of their quotient, the signal-to-noise ratio of 64 pictures; it may come out negative where there is no signal;
- the *gain*, what an update of length 1 along g adds to the objective to first order, is the mean inner product of g
  with the objective's own gradient from other chunks, over the root of the mean of |g|^2. The objective is the expected
  reward of a picture, penalties included (what `image` compares), and its gradient at a step that of the sum of the
  latent's log densities times the reward less its group's mean: not normalised, nor clipped. So gains are in the
  reward's own units, thousandths of them; "less image's" is from the same chunks.

Intervals: 95%, jackknife over chunks. All steps and kinds cost the same. Every picture has noise of its own, whatever
`share_noise` says.
"""

import copy
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from report import Row, flags, publish

from finetune.run import load_policy
from reward.arguments import parse_arguments, read_prompt_file
from rl.advantages import group_advantages
from rl.attention import WordAttention
from rl.ddpo import DDPOConfig
from rl.experience import credit_map, gather_experience, rollout_noise, sample_and_score
from rl.rollout import draw_prompts
from rl.scoring import score
from rl.sde import resolve_train_steps
from rl.step_gradients import step_gradients
from rl.timing import PhaseClock
from run_ddpo import RunArguments

PICTURES = 64
OBJECTIVE = "objective"
CREDITS = {
    "image": {},
    "scalar": {"credit": "scalar"},
    "focus on maps": {"credit": "focus"},
    "focus on content": {"credit": "focus", "focus_on": "content"},
    "words": {"credit": "words"},
    "paid, own place": {"credit": "paid", "paid_reach": 0},
    "paid": {"credit": "paid", "paid_reach": 2},
    "paid, unit": {"credit": "paid", "paid_scale": "unit"},
    "mask": {"credit": "mask"},
}


def with_credit(args: DDPOConfig, **changes) -> DDPOConfig:
    """The same settings but for the kind of credit."""
    kind = copy.copy(args)
    for setting, value in {"credit": "image", **changes}.items():
        setattr(kind, setting, value)
    return kind


def collect(options: Namespace, chunks: int) -> tuple[list[int], dict[str, np.ndarray]]:
    """The steps, and for each kind of credit and `OBJECTIVE` (chunks, steps, parameters) float32: minus the gradient of
    the LoRA's weights."""
    with tempfile.TemporaryDirectory() as folder:
        run, args = parse_arguments(
            [RunArguments, DDPOConfig], ["--config", str(options.config), "--output_dir", folder]
        )
    policy, reward = load_policy(run.policy, args), run.make_reward()
    args.per_device_train_batch_size = PICTURES
    _, schedule = args.make_schedule(policy.scheduler)
    steps = [
        step for step in resolve_train_steps("all", schedule) if options.steps in (None, []) or step in options.steps
    ]
    prompts, groups = read_prompt_file(run.prompts), PICTURES // args.num_generations
    kinds = {name: with_credit(args, **CREDITS[name]) for name in options.credits}
    names = [*kinds, OBJECTIVE]
    network, moves = policy.network.train(), None
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for chunk in range(chunks):
        drawn = draw_prompts(prompts, groups, chunk, options.seed)
        drawn = [prompt for prompt in drawn for _ in range(args.num_generations)]
        noise = rollout_noise(policy, schedule, options.seed, chunk, range(PICTURES))
        with WordAttention(policy.pipeline.unet, policy.latent_shape[1:], PICTURES) as attention:
            batch = sample_and_score(policy, network, reward, drawn, noise, schedule, steps, args, PhaseClock(), chunk)
        images = policy.decode(batch.trajectory.final_latents)
        said = score(reward, images, drawn)
        credits = []
        for kind in kinds.values():
            maps = credit_map(policy, kind, said, images, drawn, attention.maps)
            compared = gather_experience([replace(batch, maps=maps)], drawn, kind, lambda tensor: tensor, rank=0)
            credits.append(compared.advantages[:, None, None] * compared.weights)
        credits.append(objective_credit(said.objective, args.num_generations, batch.trajectory.final_latents))
        gradients = step_gradients(
            policy, batch.trajectory, drawn, torch.stack(credits), schedule, args, range(PICTURES)
        )
        if moves is None:
            moves = (gradients != 0).flatten(0, 1).any(dim=0)  # of a new LoRA, only B has a gradient
        for name, of in zip(names, gradients, strict=True):
            found[name].append(of[:, moves].numpy())
        print(f"{chunk + 1} of {chunks} chunks", flush=True)
    return steps, {name: np.stack(gradients) for name, gradients in found.items()}


def objective_credit(objective: torch.Tensor, group: int, latents: torch.Tensor) -> torch.Tensor:
    """What `step_gradients` has to be given for the gradient of the expected reward itself: (N,) -> (N, h, w).

    Its log-prob at a place is the mean over channels, and it takes the mean over places, so the sum is their number
    times as much; and a mean that the picture itself is in takes 1 / G of its reward away.

    Args:
        objective: rewards, groups of `group` pictures next to each other.
        latents: (N, C, h, w).
    """
    centred = group_advantages(objective, group, std_floor=0, scale="none") * group / (group - 1)
    return (centred * latents[0].numel())[:, None, None].expand(-1, *latents.shape[2:])


def signal_to_noise(gram: np.ndarray) -> float:
    """|E g| / noise, signed, from the inner products (n, n) of n chunks' gradients."""
    count = len(gram)
    signal = (gram.sum() - np.trace(gram)) / (count * (count - 1))
    noise = np.trace(gram) / count - signal
    return float(np.sign(signal) * np.sqrt(abs(signal) / noise))


def gain(products: np.ndarray, squares: np.ndarray) -> float:
    """<E g, E f> / sqrt(E |g|^2), in thousandths.

    Args:
        products: (n, n), inner products of g of one chunk (rows) with f of another (columns); the diagonal is not used.
        squares: (n,), |g|^2.
    """
    count = len(products)
    return float((products.sum() - np.trace(products)) / (count * (count - 1)) / np.sqrt(squares.mean()) * 1e3)


def jackknife(of: Callable[[np.ndarray], float], count: int) -> tuple[float, float, float]:
    """What `of` says of all `count` chunks (an index array), and its 95% interval by leaving one out."""
    everything = np.arange(count)
    value, less = of(everything), [of(np.delete(everything, chunk)) for chunk in range(count)]
    error = np.sqrt((count - 1) * np.var(less))
    return value, value - 1.96 * error, value + 1.96 * error


def table(steps: list[int], gradients: dict[str, np.ndarray]) -> list[Row]:
    """The rows, step by step."""
    kinds = {name: of for name, of in gradients.items() if name != OBJECTIVE}
    rows, count = [], len(gradients[OBJECTIVE])
    for k, step in enumerate(steps):
        objective, gains = gradients[OBJECTIVE][:, k], {}
        for name, of in kinds.items():
            own, across = of[:, k] @ of[:, k].T, of[:, k] @ objective.T
            ratio = jackknife(lambda who, own=own: signal_to_noise(own[np.ix_(who, who)]), count)
            rows.append(Row(f"step {step}, {name}: signal to noise", *ratio, n=count * PICTURES))

            def gained(who: np.ndarray, own=own, across=across) -> float:
                return gain(across[np.ix_(who, who)], own.diagonal()[who])

            gains[name] = gained
            rows.append(Row(f"step {step}, {name}: gain", *jackknife(gained, count), n=count * PICTURES))
            if name != "image":
                plain = gains["image"]
                less = jackknife(lambda who, one=gained, plain=plain: one(who) - plain(who), count)
                rows.append(Row(f"step {step}, {name}: gain less image's", *less, n=count * PICTURES))
    return rows


def main() -> None:
    parser = flags(__doc__.splitlines()[0], seeds=None)
    parser.add_argument("--config", type=Path, default=Path("configs/ddpo_tinyworld.yaml"))
    parser.add_argument("--chunks", type=int, default=48, help=f"of {PICTURES} pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", nargs="*", type=int, help="which sampling steps (default: all with noise)")
    parser.add_argument("--credits", nargs="+", default=list(CREDITS), choices=list(CREDITS), help="besides image")
    options = parser.parse_args()
    options.credits = list(dict.fromkeys(["image", *options.credits]))
    began = time.perf_counter()
    steps, gradients = collect(options, 3 if options.quick else options.chunks)
    publish(table(steps, gradients), began, options.json, options.quick)


if __name__ == "__main__":
    main()
