"""How far the noise at one place reaches: what credit by place can be about, sampling step by sampling step.

    python benchmarks/noise_reach.py [--config configs/ddpo_tinyworld.yaml] [--pictures 256] [--quick] [--json FILE]

Credit by place (`rl/credit.py`) holds a place's noise responsible for what is drawn there. So: pictures are sampled by
the config's policy, untrained, and once more for each draw of noise - the start, and each step's - with that draw
alone, at one latent place alone, made anew. What is then different in the final latents, squared and summed over
channels, is summed within so many places of that one, along either axis. A few pictures change much more than most, so
two shares within 1, 2 and 4 places are printed: of the change of all pictures together, to which these few give most of
the weight, and the mean of each picture's own; with them the median and the mean change of a picture. Intervals:
bootstrap over pictures. And the share there would be if all places changed alike.
"""

import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from report import Row, flags, publish
from scipy.stats import bootstrap

from finetune.run import load_policy
from reward.arguments import parse_arguments, read_prompt_file
from rl.ddpo import DDPOConfig
from rl.experience import rollout_noise
from rl.keyed import keyed_generator
from rl.policy import StableDiffusionPolicy
from rl.rollout import draw_prompts, sample
from rl.sde import Schedule
from run_ddpo import RunArguments

REACHES = (1, 2, 4)
BATCH = 64
DRAWS = 2000


def distances(places: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(N, 2) places (row, column) of an (h, w) grid -> (N, h, w): how far each place is, along the longer axis."""
    rows, columns = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    away = torch.stack([rows, columns])[None] - places[:, :, None, None]
    return away.abs().amax(dim=1)


def made_anew(noise: torch.Tensor, fresh: torch.Tensor, draw: int, places: torch.Tensor) -> torch.Tensor:
    """`noise` (N, S + 1, C, h, w) with one of its S + 1 draws taken from `fresh`, at each picture's place (N, 2)."""
    at = distances(places, tuple(noise.shape[-2:])).to(noise.device) == 0
    changed = noise.clone()
    changed[:, draw] = torch.where(at[:, None], fresh[:, draw], noise[:, draw])
    return changed


def near(change: torch.Tensor, places: torch.Tensor) -> dict[int, torch.Tensor]:
    """Of a change (N, h, w) >= 0, how much (N,) is within each of `REACHES` of the place (N, 2) it began at."""
    away = distances(places, tuple(change.shape[-2:])).to(change.device)
    return {reach: (change * (away <= reach)).sum(dim=(1, 2)) for reach in REACHES}


def resampled(of: Callable[..., np.ndarray], *values: np.ndarray) -> tuple[float, float, float]:
    """What `of` says of values (N,) of the same pictures, and its 95% bootstrap interval over pictures.

    Args:
        of: is given the values, of pictures along the last axis, and that axis.
    """
    found = bootstrap(values, of, paired=True, n_resamples=DRAWS, method="percentile", rng=np.random.default_rng(0))
    low, high = found.confidence_interval
    return float(of(*values, axis=-1)), float(low), float(high)


def share_of_all(inside: np.ndarray, whole: np.ndarray, axis: int) -> np.ndarray:
    """Of the change of all pictures together, the share of what is `inside`."""
    return inside.sum(axis=axis) / whole.sum(axis=axis)


def changes(
    policy: StableDiffusionPolicy, schedule: Schedule, prompts: Sequence[str], pictures: range, args: DDPOConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each draw of noise that counts changes in the final latents, (draws, N, h, w), and the N places (N, 2)."""
    height, width = policy.latent_shape[1:]
    generator = keyed_generator(args.seed, "reach", pictures.start)
    where = torch.randint(height * width, (len(pictures),), generator=generator)
    places = torch.stack([where // width, where % width], dim=1)
    noise, fresh = (rollout_noise(policy, schedule, args.seed, name, pictures) for name in ("reach", "reach anew"))

    def drawn(noise: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return sample(policy, policy.network, prompts, noise, schedule, (), args.guidance_scale).final_latents

    plain = drawn(noise)
    # The last step has no noise, and what is not used changes nothing.
    used = [0, *(step + 1 for step, std in enumerate(schedule.stds.tolist()) if std > 0)]
    found = [drawn(made_anew(noise, fresh, draw, places)) - plain for draw in used]
    return torch.stack([difference.square().sum(dim=1) for difference in found]), places


def rows_of(change: torch.Tensor, places: torch.Tensor) -> list[Row]:
    """Of (draws, N, h, w), the start first, and (N, 2)."""
    rows, count = [], len(places)
    for draw, of in enumerate(change):
        name = f"noise of step {draw - 1}" if draw else "the start"
        whole = of.sum(dim=(1, 2)).double().cpu().numpy()
        rows.append(Row(f"{name}: median change of a picture", *resampled(np.median, whole), n=count))
        rows.append(Row(f"{name}: mean change of a picture", *resampled(np.mean, whole), n=count))
        for reach, inside in near(of, places).items():
            near_by = inside.double().cpu().numpy()
            share = f"{name}: share within {reach}"
            rows.append(Row(f"{share}, all pictures together", *resampled(share_of_all, near_by, whole), n=count))
            rows.append(Row(f"{share}, mean over pictures", *resampled(np.mean, near_by / whole), n=count))
    alike = torch.ones_like(change[0])
    for reach, inside in near(alike, places).items():
        share = float((inside / alike.sum(dim=(1, 2))).mean())
        rows.append(Row(f"if all places changed alike: share within {reach}", share, n=count))
    return rows


def measured(options: Namespace) -> list[Row]:
    argv = ["--config", str(options.config), "--output_dir"]
    with TemporaryDirectory() as folder:
        run, args = parse_arguments([RunArguments, DDPOConfig], [*argv, folder])
    policy = load_policy(run.policy, args)
    _, schedule = args.make_schedule(policy.scheduler)
    prompts = draw_prompts(read_prompt_file(run.prompts), options.pictures, 0, args.seed)
    found = []
    for first in range(0, options.pictures, BATCH):
        pictures = range(first, min(first + BATCH, options.pictures))
        found.append(changes(policy, schedule, prompts[first : pictures.stop], pictures, args))
    change, places = zip(*found, strict=True)
    return rows_of(torch.cat(change, dim=1), torch.cat(places))


def main() -> None:
    parser = flags(__doc__.splitlines()[0], seeds=None)
    parser.add_argument("--config", type=Path, default=Path("configs/ddpo_tinyworld.yaml"))
    parser.add_argument("--pictures", type=int, default=256)
    options = parser.parse_args()
    options.pictures = 16 if options.quick else options.pictures
    began = time.perf_counter()
    publish(measured(options), began, options.json, options.quick)


if __name__ == "__main__":
    main()
