"""The arithmetic of a rollout's batches: pictures, rows, micro-batches, updates."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rl.adapter import require

if TYPE_CHECKING:
    from rl.ddpo_config import DDPOConfig


@dataclass(frozen=True)
class RolloutPlan:
    """How the pictures of one rollout become micro-batches and optimizer updates.

    A row is a pair (picture, trained timestep). A micro-batch is `per_device_train_batch_size` consecutive pictures at
    *one* timestep - the very batch the rollout ran at that step, so that on the first pass the ratio is exactly 1 -
    and is one plain forward and backward. An epoch of the Trainer is one rollout.

    Example: `generation_batch_size` 256, `num_generations` 8, `train_steps` [1, 2], one rank,
    `per_device_train_batch_size` 64, `gradient_accumulation_steps` 8, `num_train_epochs` 20:

        256 pictures / 8               = 32 prompts a rollout
        256 pictures * 2 steps         = 512 rows
        512 rows / 64                  = 8 micro-batches (`steps_per_generation`), in the order
                                         pictures 0-63 at step 1, 0-63 at step 2, 64-127 at step 1, ...
        8 micro-batches / 8            = 1 optimizer update a rollout
        20 rollouts * 1                = 20 updates (`max_steps`)

    On two ranks, each has 128 of the pictures, 256 rows, 4 micro-batches: `gradient_accumulation_steps` must be 4 (or 2
    or 1, for 2 or 4 updates a rollout). With `num_iterations` 2 every micro-batch is gone through twice.

    Attributes:
        pictures: of a rollout, over all ranks.
        pictures_per_rank: on this rank.
        prompts: of a rollout, over all ranks.
        train_steps: number of trained steps, K.
        micro_batches: of one pass over a rollout, on each rank; TRL's `steps_per_generation`.
        updates: optimizer updates a rollout, over all its passes.
    """

    pictures: int
    pictures_per_rank: int
    prompts: int
    train_steps: int
    micro_batches: int
    updates: int


def passes(args: "DDPOConfig", train_steps: Sequence[int], steps: int) -> float:
    """What a rollout of `steps` sampling steps and its update on `train_steps` cost: forward passes of the network, a
    picture. A backward pass counts as two.

    Where the pictures of a group share their noise, those of a batch are one until behind the first trained step
    (`rl.trunks`).
    """
    group, shared = args.num_generations, args.share_noise != "none" and args.credit != "words"

    def rows_of_one(batch: int) -> float:
        """Of a picture where its group is one in each batch: the parts that batches cut groups into, a picture."""
        whole = math.lcm(batch, group)
        return (whole // batch + whole // group - 1) / whole if shared else 1.0

    batch = args.per_device_train_batch_size
    sampled = rows_of_one(args.per_device_rollout_batch_size or batch)
    drawn = (min(train_steps) + 1) * sampled + steps - min(train_steps) - 1
    trained = rows_of_one(batch) + len(train_steps) - 1
    updated = trained * args.num_iterations * (4 if args.beta > 0 else 3)
    if args.guidance_scale == 1:
        return drawn + updated
    if args.train_guidance:
        return 2 * (drawn + updated)
    asked_again = sampled + len(train_steps) - 1  # by the rollout, for the log-probs without guidance
    return 2 * drawn + asked_again + updated


def plan_rollout(args: "DDPOConfig", train_steps: int) -> RolloutPlan:
    """The arithmetic of a rollout of which `train_steps` sampling steps are trained; see `RolloutPlan`.

    Raises:
        ValueError: numbers that do not divide; the message gives them and the remedy.
    """
    world, batch, accumulate = args.world_size, args.per_device_train_batch_size, args.gradient_accumulation_steps
    pictures = args.generation_batch_size
    if pictures is None:
        require(
            args.steps_per_generation % train_steps == 0,
            f"steps_per_generation ({args.steps_per_generation}) is not a multiple of the number of trained "
            f"steps ({train_steps}); use {near(args.steps_per_generation, train_steps)}",
        )
        pictures = args.steps_per_generation // train_steps * batch * world
        check_pictures(args, pictures)
    if args.probed_steps is not None:
        check_chunks(args, pictures)
    micro_batches = pictures // (world * batch) * train_steps
    fitting = [number for number in range(1, micro_batches + 1) if micro_batches % number == 0]
    require(
        micro_batches % accumulate == 0,
        f"gradient_accumulation_steps ({accumulate}) does not divide the {micro_batches} micro-batches of a "
        f"rollout ({pictures} pictures x {train_steps} trained steps / {batch} rows / {world} processes); "
        f"use one of {', '.join(map(str, fitting))}",
    )
    updates = micro_batches // accumulate * args.num_iterations
    require(
        args.max_steps <= 0 or args.max_steps % updates == 0,
        f"max_steps ({args.max_steps}) is not a multiple of the {updates} updates of a rollout; "
        f"use {near(args.max_steps, updates)}, or num_train_epochs, which counts rollouts",
    )
    require(
        args.max_steps > 0 or args.num_train_epochs == int(args.num_train_epochs),
        f"num_train_epochs is {args.num_train_epochs}; it counts rollouts, so it must be a whole number",
    )
    require(
        args.save_strategy != "steps" or (args.save_steps >= 1 and args.save_steps % updates == 0),
        f"save_steps ({args.save_steps}) is not a multiple of the {updates} updates of a rollout, and a "
        "checkpoint holds no half-used rollout; "
        f"use {near(int(max(args.save_steps, 1)), updates)}, or save_strategy epoch",
    )
    if args.eval_strategy == "steps":
        require(
            args.eval_steps >= 1 and args.eval_steps % updates == 0,
            f"eval_steps ({args.eval_steps}) is not a multiple of the {updates} updates of a rollout, on whose ends "
            f"evaluations fall; use {near(int(max(args.eval_steps, 1)), updates)}, or eval_strategy epoch",
        )
    return RolloutPlan(
        pictures=pictures,
        pictures_per_rank=pictures // world,
        prompts=pictures // args.num_generations,
        train_steps=train_steps,
        micro_batches=micro_batches,
        updates=updates,
    )


def check_pictures(args: "DDPOConfig", pictures: int) -> None:
    world, batch, group = args.world_size, args.per_device_train_batch_size, args.num_generations
    require(
        pictures % group == 0,
        f"generation_batch_size ({pictures}) is not a multiple of num_generations ({group}); "
        f"use {near(pictures, group)} pictures a rollout",
    )
    require(
        pictures % (world * batch) == 0,
        f"generation_batch_size ({pictures}) is not a multiple of per_device_train_batch_size ({batch}) times "
        f"the number of processes ({world}); use {near(pictures, world * batch)} pictures a rollout, "
        "or another batch size",
    )


def check_chunks(args: "DDPOConfig", pictures: int) -> None:
    size, world = args.chunk_size, args.world_size
    require(
        pictures % (size * world) == 0 and pictures >= 3 * size,
        f"train_steps auto compares the gradients of chunks of {size} pictures (whole groups of "
        f"{args.num_generations}, whole micro-batches of {args.per_device_train_batch_size}), at least 3 of them, "
        f"shared evenly by the {world} processes; a rollout of {pictures} has not: set generation_batch_size to a "
        f"multiple of {size * world} from {-(-3 // world) * size * world} on, or a smaller batch size",
    )


def near(number: int, divisor: int) -> str:
    below = number // divisor * divisor
    return f"{below} or {below + divisor}" if below else str(divisor)


def check_rollout(args: "DDPOConfig") -> None:
    require(
        args.generation_batch_size is None or args.steps_per_generation is None,
        f"generation_batch_size ({args.generation_batch_size}) and steps_per_generation "
        f"({args.steps_per_generation}) both say how large a rollout is; give one of them",
    )
    if args.generation_batch_size is None and args.steps_per_generation is None:
        args.generation_batch_size = 256
    if args.generation_batch_size is not None:
        check_pictures(args, args.generation_batch_size)
