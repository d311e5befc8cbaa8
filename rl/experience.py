"""From prompts to what the update needs: sample, decode, score, compare within groups.

Shapes: N pictures on this rank, K trained steps, C latent channels, h x w the latent grid.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from reward.feedback import Reward, RewardFn
from rl.advantages import PromptStatistics, group_advantages, keep_groups_that_differ
from rl.attention import WordAttention, word_positions
from rl.credit import (
    content_map,
    focus_weights,
    mask_weights,
    paid_credit,
    penalty_map,
    to_latent_grid,
    unit_paid_credit,
    word_map,
)
from rl.ddpo_config import DDPOConfig
from rl.keyed import keyed_noise
from rl.lora_dropout import DropoutKeys
from rl.monitors import diversity, edge_energy, thumbnails
from rl.policy import StableDiffusionPolicy
from rl.rollout import Trajectory, check_pictures, sample
from rl.scoring import concatenate, features, score
from rl.sde import Schedule
from rl.timing import PhaseClock
from rl.trunks import Trunks
from rl.watch import measure_pictures, measure_rollout


@dataclass(frozen=True)
class Samples:
    """A few pictures to look at.

    Attributes:
        images: (n, 3, H, W) in [0, 1], on the CPU.
        prompts: n prompts.
        reward: of these n pictures; None where nobody was asked.
    """

    images: torch.Tensor
    prompts: Sequence[str]
    reward: Reward | None

    @classmethod
    def of(cls, images: torch.Tensor, prompts: Sequence[str], reward: Reward | None, count: int) -> "Samples":
        """The first `count` pictures of a batch."""
        reward = None if reward is None else reward.first(count).cpu()
        return cls(images[:count].cpu(), list(prompts[:count]), reward)

    @classmethod
    def together(cls, parts: Sequence["Samples"]) -> "Samples":
        """Of scored batches, in order."""
        rewards = concatenate([part.reward for part in parts])
        return cls(torch.cat([part.images for part in parts]), [one for part in parts for one in part.prompts], rewards)


@dataclass(frozen=True)
class ScoredBatch:
    """Pictures that were sampled together, and what became of them.

    Attributes:
        trajectory: of B pictures.
        maps: (B, h, w) >= 0, the map that credit goes by; None where it goes by none.
        values: name -> (B,) float32: `objective`, `total`, `edge_energy`, `term/<name>`, `penalty/<name>` (map's mean).
        measures: name -> (B,) float32, more of what `rl.watch` looks at.
        thumbnails: (B, 3, <= 64, <= 64).
        features: (B, D), what the reward sees in the pictures; None if it does not tell.
        samples: the first few pictures; None if none are wanted.
    """

    trajectory: Trajectory
    maps: torch.Tensor | None
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
        weights: (N, h, w) float32: where the advantage acts; their product is what the log-prob at a place is
            multiplied by.
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
    trunks: Trunks | None = None,
    dropout_keys: DropoutKeys | None = None,
) -> ScoredBatch:
    """One batch of pictures of a rollout, one a prompt, from `noise` (B, S + 1, C, h, w) to its scores.

    Args:
        trunks, dropout_keys: see `rl.rollout.sample`.
        held_out: a reward that is not trained on, to watch.

    Raises:
        DivergedError, RewardError: what the policy draws, or what the reward says of it, is not finite.
    """
    grid = policy.latent_shape[1:]
    by_words = args.credit == "words" and len(train_steps) > 0
    looking = WordAttention(policy.pipeline.unet, grid, len(prompts)) if by_words else None
    with clock("rollout"), looking or nullcontext():
        trajectory = sample(
            policy, network, prompts, noise, schedule, train_steps, args.guidance_scale, args.train_guidance, on_step,
            trunks, dropout_keys,
        )  # fmt: skip
    with clock("decode"):
        images = policy.decode(trajectory.final_latents)
    check_pictures(trajectory.final_latents, images, prompts, f"rollout {rollout}")
    with clock("reward"):
        reward = score(reward_fn, images, prompts, args.reward_batch_size)
    with clock("watch"):
        measures = measure_pictures(images, prompts, reward, reward_fn, held_out, args.reward_batch_size)
        seen = features(reward_fn, images, args.reward_batch_size)
    maps = credit_map(policy, args, reward, images, prompts, looking.maps if looking else None)
    values = {"objective": reward.objective, "total": reward.total, "edge_energy": edge_energy(images)}
    values |= {f"term/{name}": value for name, value in reward.terms.items()}
    values |= {f"penalty/{name}": value.mean(dim=(-2, -1)) for name, value in reward.penalties.items()}
    return ScoredBatch(
        trajectory=trajectory,
        maps=maps,
        values={name: value.float().to(images.device) for name, value in values.items()},
        measures=measures,
        thumbnails=thumbnails(images),
        features=seen,
        samples=Samples.of(images, prompts, reward, num_samples) if num_samples else None,
    )


def credit_map(
    policy: StableDiffusionPolicy,
    args: DDPOConfig,
    reward: Reward,
    images: torch.Tensor,
    prompts: Sequence[str],
    attention: torch.Tensor | None,
) -> torch.Tensor | None:
    """The map (B, h, w) that the kind of credit goes by, on the pictures' device; None where it needs none.

    Args:
        images: (B, 3, H, W) in [0, 1].
        attention: (B, L, h', w') of `rl.attention.WordAttention`, for credit `words`.

    Raises:
        ValueError: the reward does not say what the kind of credit needs.
    """
    grid = policy.latent_shape[1:]
    check_credit_is_told(args, told_by(reward))
    if args.credit == "words":
        positions = word_positions(policy.pipeline.tokenizer, prompts)
        return to_latent_grid(word_map(attention, positions, reward.word_penalties), grid).to(images.device)
    if args.credit == "focus" and args.focus_on == "content":
        return to_latent_grid(content_map(images), grid)
    if not _goes_by_maps(args):
        return None
    return penalty_map(reward.penalties, grid).to(images.device)


def check_credit_is_told(args: DDPOConfig, given: Collection[str]) -> None:
    """Complain if the reward does not say what the kind of credit goes by.

    Args:
        given: which of `penalties` and `word_penalties` the reward has.

    Raises:
        ValueError: it has no penalties of words, or no maps.
    """
    if args.credit == "words" and "word_penalties" not in given:
        raise ValueError(
            "credit words needs a reward that says what each word costs (word_penalties); this one does not: "
            "give it a word_weight, or choose another credit"
        )
    if _goes_by_maps(args) and "penalties" not in given:
        instead = ", or set focus_on to content" if args.credit == "focus" else ""
        raise ValueError(
            f"credit {args.credit}{' on maps' if args.credit == 'focus' else ''} needs a reward with penalty maps; "
            f"this one has none: give its heatmaps a weight{instead}"
        )


def check_reward_fits_credit(policy: StableDiffusionPolicy, reward_fn: RewardFn, args: DDPOConfig, prompt: str) -> None:
    """Ask a reward about two grey pictures whether it says what the kind of credit goes by; only if it goes by any.

    Raises:
        ValueError: see `check_credit_is_told`.
        RewardError: what it says cannot be trained on.
    """
    if args.credit == "words" or _goes_by_maps(args):
        sides = [side * policy.pipeline.vae_scale_factor for side in policy.latent_shape[1:]]
        grey = torch.full((2, 3, *sides), 0.5, device=policy.device)
        check_credit_is_told(args, told_by(score(reward_fn, grey, [prompt, prompt], args.reward_batch_size)))


def told_by(reward: Reward) -> set[str]:
    """What credit may go by that a reward says: "penalties", "word_penalties"."""
    given = {"penalties": bool(reward.penalties), "word_penalties": reward.word_penalties is not None}
    return {name for name, there in given.items() if there}


def _goes_by_maps(args: DDPOConfig) -> bool:
    return args.credit in ("paid", "mask") or (args.credit == "focus" and args.focus_on == "maps")


def gather_experience(
    batches: Sequence[ScoredBatch],
    prompts: Sequence[str],
    args: DDPOConfig,
    gather: Callable[[torch.Tensor], torch.Tensor],
    rank: int,
    statistics: PromptStatistics | None = None,
) -> Experience:
    """Compare the pictures of one rollout with each other, over all ranks, and say where that should count.

    Args:
        batches: this rank's, in order.
        prompts: of all ranks' pictures, in order.
        gather: (N, ...) -> (N * ranks, ...), the ranks' tensors one after another.
        rank: of this process.
        statistics: what `advantage_baseline: prompt` compares with; it takes in this rollout.
    """
    trajectory = _join([batch.trajectory for batch in batches])
    values = {name: gather(torch.cat([batch.values[name] for batch in batches])) for name in batches[0].values}
    maps = gather(torch.cat([batch.maps for batch in batches])) if batches[0].maps is not None else None
    compared = values["total" if args.credit == "scalar" else "objective"]
    settings = {"std_floor": args.advantage_std_floor, "clip": args.advantage_clip, "scale": args.scale_rewards}
    metrics = {name: float(value.mean()) for name, value in values.items() if name != "edge_energy"}
    if args.advantage_baseline == "prompt":
        advantages = statistics.advantages(prompts, compared, **settings)
    elif args.advantage_baseline == "batch":
        advantages = group_advantages(compared, len(compared), **settings)
    else:
        advantages = group_advantages(compared, args.num_generations, **settings)
    weights = _place_weights(args, maps, values["total"], trajectory)
    if args.credit == "paid":  # a place's credit is not the picture's times a weight
        advantages, weights = torch.ones_like(advantages), weights.clamp(-args.advantage_clip, args.advantage_clip)
    if args.advantage_baseline == "group":
        advantages, metrics["groups_skipped"] = keep_groups_that_differ(
            advantages, compared, args.num_generations, args.min_group_std
        )
    everyone = gather(torch.cat([batch.thumbnails for batch in batches]))
    measured = {name: gather(torch.cat([batch.measures[name] for batch in batches])) for name in batches[0].measures}
    seen = everyone if batches[0].features is None else gather(torch.cat([batch.features for batch in batches]))
    if args.num_generations > 1:
        metrics["diversity"] = float(diversity(everyone, args.num_generations).mean())
        metrics["group_std"] = float(compared.view(-1, args.num_generations).std(dim=1, correction=0).mean())
    shown = [batch.samples for batch in batches if batch.samples is not None]
    count = len(trajectory.final_latents)
    mine = slice(rank * count, (rank + 1) * count)
    return Experience(
        trajectory=trajectory,
        prompts=prompts[mine],
        advantages=advantages[mine],
        weights=weights[mine],
        metrics=metrics,
        measures=measure_rollout(
            {**measured, "drawn": values["edge_energy"]}, compared, seen, args.num_generations, args.advantage_std_floor
        ),
        samples=Samples.together(shown) if shown else None,
    )


def _place_weights(
    args: DDPOConfig, maps: torch.Tensor | None, totals: torch.Tensor, trajectory: Trajectory
) -> torch.Tensor:
    """(N, h, w), what each place's advantage is multiplied by, of the pictures of all ranks."""
    if maps is None:
        return trajectory.log_probs.new_ones(len(totals), *trajectory.final_latents.shape[-2:])
    if args.credit == "mask":
        return mask_weights(maps, float(maps.max()))
    if args.credit == "paid" and args.paid_scale == "unit":
        return unit_paid_credit(totals, maps, args.num_generations, args.advantage_std_floor, args.paid_weight)
    if args.credit == "paid":
        return paid_credit(totals, maps, args.num_generations, args.advantage_std_floor, args.paid_reach)
    return focus_weights(maps, args.focus_floor)


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
