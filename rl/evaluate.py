"""How good a policy is on prompts it was not trained on: one number a picture, so that runs can be compared in pairs.

Shapes: P prompts, G pictures of each, B pictures of a batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from reward.feedback import RewardFn
from rl.experience import Samples, rollout_noise
from rl.monitors import diversity, edge_energy, thumbnails
from rl.policy import StableDiffusionPolicy
from rl.rollout import check_pictures, sample
from rl.scoring import score
from rl.sde import Schedule

TRAINING_REWARD = "reward"
"""Name of the reward that was trained on, among those a policy is evaluated by."""


@dataclass(frozen=True)
class Evaluation:
    """What the rewards say of G pictures for each of P prompts.

    Attributes:
        prompts: the P prompts.
        values: name -> (P, G) float32: `reward` (the objective trained on, if there is one), `reward.<term>` its terms,
            and for every other reward `<name>.total` and `<name>.<term>`; `edge_energy`, how much is drawn.
        diversity: (P,) mean pairwise distance of a prompt's pictures (see `rl.monitors`); NaN where G = 1.
    """

    prompts: Sequence[str]
    values: dict[str, torch.Tensor]
    diversity: torch.Tensor

    def curves(self) -> dict[str, float]:
        """The summary's figures as the Trainer logs them: TensorBoard shows `eval_judge/satisfied` under `eval`."""
        figures = {name: value for name, value in self.summary().items() if name not in ("n", "generations")}
        return {f"eval_{name.replace('.', '/')}": value for name, value in figures.items() if value is not None}

    def summary(self) -> dict[str, float | int | None]:
        """Means over all pictures, `diversity` (None where G = 1), `n` prompts and `generations` of each."""
        means = {name: float(value.mean()) for name, value in sorted(self.values.items())}
        spread = float(self.diversity.mean())
        generations = next(iter(self.values.values())).shape[1]
        return {**means, "diversity": None if generations < 2 else spread, "n": len(self.prompts),
                "generations": generations}  # fmt: skip


@dataclass(frozen=True)
class HeldOut:
    """What a policy is judged on, before, after and in the midst of its training; always from the same noise.

    Attributes:
        prompts: that it is not trained on.
        rewards: name -> reward function; the one trained on, if there is one, is called `TRAINING_REWARD`.
        generations: pictures of each prompt.
        seed: of the noise.
        num_samples: pictures to look at.
    """

    prompts: Sequence[str]
    rewards: Mapping[str, RewardFn]
    generations: int = 2
    seed: int = 0
    num_samples: int = 8


@torch.no_grad()
def evaluate(
    policy: StableDiffusionPolicy,
    schedule: Schedule,
    prompts: Sequence[str],
    rewards: Mapping[str, RewardFn],
    *,
    generations: int,
    seed: int,
    guidance_scale: float = 1.0,
    batch_size: int = 64,
    reward_batch_size: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    gather: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    on_batch: Callable[[int], None] = lambda pictures: None,
    on_images: Callable[[Sequence[int], torch.Tensor], None] = lambda pictures, images: None,
) -> Evaluation:
    """Sample `generations` pictures for each prompt and ask every reward for its opinion.

    The noise is keyed by (`seed`, prompt, generation): another policy, another batch size and any number of ranks draw
    from the same noise.

    Args:
        rewards: name -> reward function; the one trained on, if there is one, is called `reward`.
        rank, world_size: the ranks share the prompts among them.
        gather: (B, ...) -> (B * ranks, ...), the ranks' tensors one after another.
        on_batch: called after each batch with its number of pictures.
        on_images: called with the numbers of a batch's pictures (prompt * `generations` + generation), and them.

    Raises:
        DivergedError, RewardError: what the policy draws, or what a reward says of it, is not finite.
    """
    share = -(-len(prompts) // world_size)  # the last rank repeats the last prompt where prompts do not divide
    mine = [min(place, len(prompts) - 1) for place in range(rank * share, (rank + 1) * share)]
    pictures = [prompt * generations + generation for prompt in mine for generation in range(generations)]
    batches: list[dict[str, torch.Tensor]] = []
    for first in range(0, len(pictures), batch_size):
        chunk = pictures[first : first + batch_size]
        chunk_prompts = [prompts[picture // generations] for picture in chunk]
        images = _images(policy, schedule, chunk_prompts, chunk, seed, guidance_scale)
        batches.append(_opinions(rewards, images, chunk_prompts, reward_batch_size))
        on_images(chunk, images)
        on_batch(len(chunk))
    values = {name: gather(torch.cat([batch[name] for batch in batches])).cpu() for name in batches[0]}
    values = {name: value[: len(prompts) * generations] for name, value in values.items()}
    spread = diversity(values.pop("thumbnails"), generations)
    return Evaluation(prompts, {name: value.view(-1, generations) for name, value in values.items()}, spread)


@torch.no_grad()
def look(
    policy: StableDiffusionPolicy,
    schedule: Schedule,
    prompts: Sequence[str],
    reward_fn: RewardFn | None,
    *,
    count: int,
    generations: int,
    seed: int,
    guidance_scale: float = 1.0,
    batch_size: int = 64,
    reward_batch_size: int | None = None,
) -> Samples:
    """The first picture of `count` prompts spread evenly over `prompts`: the same pictures `evaluate` judges. Without a
    `reward_fn` nothing is said of them."""
    count = min(count, len(prompts))
    chosen = [place * len(prompts) // count for place in range(count)]
    chosen_prompts = [prompts[place] for place in chosen]
    pictures = [place * generations for place in chosen]
    batches = [slice(first, first + batch_size) for first in range(0, count, batch_size)]
    images = torch.cat(
        [_images(policy, schedule, chosen_prompts[rows], pictures[rows], seed, guidance_scale) for rows in batches]
    )
    reward = None if reward_fn is None else score(reward_fn, images, chosen_prompts, reward_batch_size)
    return Samples.of(images, chosen_prompts, reward, count)


def _images(
    policy: StableDiffusionPolicy,
    schedule: Schedule,
    prompts: Sequence[str],
    pictures: Sequence[int],
    seed: int,
    guidance_scale: float,
) -> torch.Tensor:
    noise = rollout_noise(policy, schedule, seed, "evaluation", pictures)
    trajectory = sample(policy, policy.network, prompts, noise, schedule, guidance_scale=guidance_scale)
    images = policy.decode(trajectory.final_latents)
    check_pictures(trajectory.final_latents, images, prompts, "the evaluation")
    return images


def _opinions(
    rewards: Mapping[str, RewardFn], images: torch.Tensor, prompts: Sequence[str], batch_size: int | None
) -> dict[str, torch.Tensor]:
    values = {"edge_energy": edge_energy(images), "thumbnails": thumbnails(images)}
    for name, reward_fn in rewards.items():
        reward = score(reward_fn, images, prompts, batch_size)
        values |= {f"{name}.{term}": value for term, value in reward.terms.items()}
        if name == TRAINING_REWARD:
            values[name] = reward.objective
        else:
            values[f"{name}.total"] = reward.objective
    return {name: value.float().to(images.device) for name, value in values.items()}
