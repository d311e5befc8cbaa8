"""From prompts to what the update needs: sample, decode, score, compare within groups.

Shapes: N pictures on this rank, K trained steps, C latent channels, h x w the latent grid.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from reward.feedback import Reward, RewardFn
from rl.advantages import content_map, focus_weights, group_advantages, penalty_map, to_latent_grid
from rl.ddpo_config import DDPOConfig
from rl.monitors import diversity, edge_energy, thumbnails
from rl.policy import StableDiffusionPolicy
from rl.rollout import Trajectory, check_pictures, keyed_noise, sample
from rl.scoring import features, score
from rl.sde import Schedule
from rl.timing import PhaseClock
from rl.watch import measure_pictures, measure_rollout


@dataclass(frozen=True)
class Samples:
    """A few pictures to look at.

    Attributes:
        images: (n, 3, H, W) in [0, 1], on the CPU.
        prompts: n prompts.
        reward: of these n pictures.
    """

    images: torch.Tensor
    prompts: Sequence[str]
    reward: Reward

    @classmethod
    def of(cls, images: torch.Tensor, prompts: Sequence[str], reward: Reward, count: int) -> "Samples":
        """The first `count` pictures of a batch."""
        words = reward.word_penalties
        return cls(
            images=images[:count].cpu(),
            prompts=list(prompts[:count]),
            reward=Reward(
                total=reward.total[:count].cpu(),
                penalties={name: value[:count].cpu() for name, value in reward.penalties.items()},
                word_penalties=None if words is None else [value.cpu() for value in words[:count]],
                terms={name: value[:count].cpu() for name, value in reward.terms.items()},
            ),
        )


@dataclass(frozen=True)
class ScoredBatch:
    """Pictures that were sampled together, and what became of them.

    Attributes:
        trajectory: of B pictures.
        focus: (B, h, w) >= 0, the map the credit is focused by; None where it is not.
        values: name -> (B,) float32: `objective`, `total`, `edge_energy`, `term/<name>`, `penalty/<name>` (map's mean).
        measures: name -> (B,) float32, more of what `rl.watch` looks at.
        thumbnails: (B, 3, <= 64, <= 64).
        features: (B, D), what the reward sees in the pictures; None if it does not tell.
        samples: the first few pictures; None if none are wanted.
    """

    trajectory: Trajectory
    focus: torch.Tensor | None
    values: dict[str, torch.Tensor]
    measures: dict[str, torch.Tensor]
    thumbnails: torch.Tensor
    features: torch.Tensor | None
    samples: Samples | None


@dataclass(frozen=True)
class Experience:
    """This rank's share of a rollout, ready to be trained on.

    Attributes:
        trajectory: of N pictures.
        prompts: N prompts.
        advantages: (N,) float32.
        weights: (N, h, w) float32, mean 1 over places: where the advantage acts.
        metrics: averages over the pictures of all ranks.
        measures: of the whole rollout, over all ranks, for `rl.watch`.
        samples: a few pictures of this rank to look at, or None.
    """

    trajectory: Trajectory
    prompts: Sequence[str]
    advantages: torch.Tensor
    weights: torch.Tensor
    metrics: dict[str, float]
    measures: dict[str, float]
    samples: Samples | None

    def micro_batches(self, size: int) -> Iterator[tuple[int, slice]]:
        """(k, pictures): `size` consecutive pictures at the k-th trained step; all their steps, then the next ones."""
        for first in range(0, len(self.prompts), size):
            for k in range(len(self.trajectory.steps)):
                yield k, slice(first, first + size)


def sample_and_score(
    policy: StableDiffusionPolicy,
    network: nn.Module,
    reward_fn: RewardFn,
    prompts: Sequence[str],
    noise: torch.Tensor,
    schedule: Schedule,
    train_steps: Sequence[int],
    args: DDPOConfig,
    clock: PhaseClock,
    rollout: int,
    num_samples: int = 0,
    on_step: Callable[[], None] = lambda: None,
    held_out: RewardFn | None = None,
) -> ScoredBatch:
    """One batch of pictures of a rollout, one a prompt, from `noise` (B, S + 1, C, h, w) to its scores.

    Args:
        held_out: a reward that is not trained on, to watch.

    Raises:
        DivergedError, RewardError: what the policy draws, or what the reward says of it, is not finite.
    """
    with clock("rollout"):
        trajectory = sample(
            policy, network, prompts, noise, schedule, train_steps, args.guidance_scale, on_step=on_step
        )
    with clock("decode"):
        images = policy.decode(trajectory.final_latents)
    check_pictures(trajectory.final_latents, images, prompts, f"rollout {rollout}")
    with clock("reward"):
        reward = score(reward_fn, images, prompts, args.reward_batch_size)
    with clock("watch"):
        measures = measure_pictures(images, prompts, reward, reward_fn, held_out, args.reward_batch_size)
        seen = features(reward_fn, images, args.reward_batch_size)
    grid = trajectory.final_latents.shape[-2:]
    focus = None
    if args.credit == "focus":
        focus = penalty_map(reward.penalties, grid) if args.focus_on == "maps" else None
        if focus is None:
            if args.focus_on == "maps":
                raise ValueError(
                    "credit focus on maps needs a reward with penalty maps; this one has none: "
                    "give its heatmaps a weight, or set focus_on to content"
                )
            focus = to_latent_grid(content_map(images), grid)
    values = {"objective": reward.objective, "total": reward.total, "edge_energy": edge_energy(images)}
    values |= {f"term/{name}": value for name, value in reward.terms.items()}
    values |= {f"penalty/{name}": value.mean(dim=(-2, -1)) for name, value in reward.penalties.items()}
    return ScoredBatch(
        trajectory=trajectory,
        focus=focus,
        values={name: value.float().to(images.device) for name, value in values.items()},
        measures=measures,
        thumbnails=thumbnails(images),
        features=seen,
        samples=Samples.of(images, prompts, reward, num_samples) if num_samples else None,
    )


def gather_experience(
    batches: Sequence[ScoredBatch],
    prompts: Sequence[str],
    args: DDPOConfig,
    gather: Callable[[torch.Tensor], torch.Tensor],
    rank: int,
) -> Experience:
    """Compare the pictures of one rollout within their groups, over all ranks.

    Args:
        batches: this rank's, in order.
        prompts: this rank's N, in order.
        gather: (N, ...) -> (N * ranks, ...), the ranks' tensors one after another.
        rank: of this process.
    """
    count = len(prompts)
    trajectory = _join([batch.trajectory for batch in batches])
    values = {name: gather(torch.cat([batch.values[name] for batch in batches])) for name in batches[0].values}
    compared = values["total" if args.credit == "scalar" else "objective"]
    advantages = group_advantages(
        compared, args.num_generations, args.advantage_std_floor, args.advantage_clip, args.scale_rewards
    )
    if batches[0].focus is None:
        weights = torch.ones_like(trajectory.log_probs[0])
    else:
        weights = focus_weights(torch.cat([batch.focus for batch in batches]), args.focus_floor).to(compared.device)
    everyone = gather(torch.cat([batch.thumbnails for batch in batches]))
    measured = {name: gather(torch.cat([batch.measures[name] for batch in batches])) for name in batches[0].measures}
    seen = everyone if batches[0].features is None else gather(torch.cat([batch.features for batch in batches]))
    metrics = {name: float(value.mean()) for name, value in values.items() if name != "edge_energy"}
    metrics["diversity"] = float(diversity(everyone, args.num_generations).mean())
    metrics["group_std"] = float(compared.view(-1, args.num_generations).std(dim=1, correction=0).mean())
    return Experience(
        trajectory=trajectory,
        prompts=prompts,
        advantages=advantages[rank * count : (rank + 1) * count],
        weights=weights,
        metrics=metrics,
        measures=measure_rollout(
            {**measured, "drawn": values["edge_energy"]}, compared, seen, args.num_generations, args.advantage_std_floor
        ),
        samples=batches[0].samples,
    )


def rollout_noise(
    policy: StableDiffusionPolicy,
    schedule: Schedule,
    seed: int,
    rollout: int | str,
    samples: Sequence[int],
    group: int = 1,
    shared: Sequence[int] = (),
) -> torch.Tensor:
    """All the noise of these sample indices: (B, S + 1, C, h, w), the same on any rank and in any batch.

    Args:
        group: samples of one prompt, which follow one another from a multiple of `group` on.
        shared: places in S + 1 (see `rl.rollout.shared_places`) at which all samples of a group have the same noise.
    """
    shape = (len(schedule) + 1, *policy.latent_shape)
    noise = keyed_noise(seed, rollout, samples, shape, policy.device)
    if shared:
        common = keyed_noise(seed, f"{rollout} by group", [sample // group for sample in samples], shape, policy.device)
        noise[:, shared] = common[:, shared]
    return noise


def _join(trajectories: Sequence[Trajectory]) -> Trajectory:
    return Trajectory(
        steps=trajectories[0].steps,
        latents=torch.cat([part.latents for part in trajectories], dim=1),
        next_latents=torch.cat([part.next_latents for part in trajectories], dim=1),
        log_probs=torch.cat([part.log_probs for part in trajectories], dim=1),
        final_latents=torch.cat([part.final_latents for part in trajectories]),
    )
