"""Which sampling steps are worth training: the signal and the noise of each step's policy gradient.

    python benchmarks/gradient_snr.py [--config configs/ddpo_tinyworld.yaml] [--chunks 16] [--quick] [--json FILE]

The policy is the config's, untrained. Chunks of 64 pictures of disjoint prompts are drawn, and for each step k and each
value (the reward's objective, and its terms) the gradient g of -mean(A log p) is taken. Gradients of two chunks share
their expectation and nothing else, so |E g|^2 is estimated without bias by the mean of their inner products, and the
noise of one chunk by mean |g|^2 - |E g|^2. Printed is their quotient, the signal-to-noise ratio of 64 pictures; it may
come out negative where there is no signal. Intervals: jackknife over chunks. A step's forward and backward pass costs
the same for all, so the ratio is also what a step pays per second. Every picture has noise of its own, whatever
`share_noise` says.
"""

import tempfile
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from report import Row, flags, publish

from reward.arguments import parse_arguments, read_prompt_file
from rl.advantages import group_advantages
from rl.ddpo import DDPOConfig
from rl.experience import rollout_noise, sample_and_score
from rl.rollout import draw_prompts
from rl.sde import ddim_scheduler, log_prob_map, make_schedule, resolve_train_steps, step_mean
from rl.timing import PhaseClock
from run_ddpo import RunArguments, load_policy

PICTURES = 64


def chunk_gradients(options: Namespace, chunks: int) -> dict[tuple[str, int], np.ndarray]:
    """(value, step) -> (chunks, parameters) float32, gradients of the LoRA's weights."""
    with tempfile.TemporaryDirectory() as folder:
        run, args = parse_arguments(
            [RunArguments, DDPOConfig], ["--config", str(options.config), "--output_dir", folder]
        )
    policy, reward = load_policy(run, args), run.make_reward()
    schedule = make_schedule(ddim_scheduler(policy.scheduler, args.start_timestep), args.num_inference_steps, args.eta)
    steps = resolve_train_steps("all", schedule)
    prompts, groups = read_prompt_file(run.prompts), PICTURES // args.num_generations
    network = policy.network.train()
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    found: dict[tuple[str, int], list[np.ndarray]] = {}
    for chunk in range(chunks):
        drawn = [
            prompt for prompt in draw_prompts(prompts, groups, chunk, options.seed) for _ in range(args.num_generations)
        ]
        noise = rollout_noise(policy, schedule, options.seed, chunk, range(PICTURES))
        batch = sample_and_score(policy, network, reward, drawn, noise, schedule, steps, args, PhaseClock(), chunk)
        values = {name.removeprefix("term/"): value for name, value in batch.values.items()}
        advantages = {
            name: group_advantages(values[name], args.num_generations, args.advantage_std_floor, args.advantage_clip)
            for name in options.values
        }
        embeds = policy.encode(drawn)
        for k, step in enumerate(steps):
            index = torch.full((PICTURES,), step)
            latents, after = batch.trajectory.latents[k], batch.trajectory.next_latents[k]
            output = policy.predict(network, latents, schedule.timesteps[index], embeds, args.guidance_scale)
            log_probs = log_prob_map(after, *step_mean(output, latents, index, schedule)).mean(dim=(-2, -1))
            for name, advantage in advantages.items():
                gradient = torch.autograd.grad(-(advantage * log_probs).mean(), weights, retain_graph=True)
                flat = torch.cat([part.flatten() for part in gradient]).numpy()
                found.setdefault((name, step), []).append(flat)
        print(f"{chunk + 1} of {chunks} chunks", flush=True)
    return {key: np.stack(gradients) for key, gradients in found.items()}


def signal_to_noise(gram: np.ndarray) -> float:
    """|E g| / noise, signed, from the inner products (n, n) of n chunks' gradients."""
    count = len(gram)
    signal = (gram.sum() - np.trace(gram)) / (count * (count - 1))
    noise = np.trace(gram) / count - signal
    return float(np.sign(signal) * np.sqrt(abs(signal) / noise))


def jackknife(gram: np.ndarray) -> tuple[float, float, float]:
    """The ratio, and its 95% interval by leaving one chunk out."""
    count = len(gram)
    value = signal_to_noise(gram)
    less = [signal_to_noise(np.delete(np.delete(gram, chunk, 0), chunk, 1)) for chunk in range(count)]
    error = np.sqrt((count - 1) * np.var(less))
    return value, value - 1.96 * error, value + 1.96 * error


def main() -> None:
    parser = flags(__doc__.splitlines()[0], seeds=None)
    parser.add_argument("--config", type=Path, default=Path("configs/ddpo_tinyworld.yaml"))
    parser.add_argument("--chunks", type=int, default=16, help=f"of {PICTURES} pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--values", nargs="+", default=["objective", "plausibility", "alignment"])
    options = parser.parse_args()
    began = time.perf_counter()
    gradients = chunk_gradients(options, 3 if options.quick else options.chunks)
    rows = [
        Row(f"{name}, step {step}", *jackknife(chunks @ chunks.T), n=len(chunks) * PICTURES)
        for (name, step), chunks in sorted(gradients.items())
    ]
    publish(rows, began, options.json, options.quick)


if __name__ == "__main__":
    main()
