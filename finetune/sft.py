"""Fine-tune a text-to-image pipeline on pictures with prompts, such as `finetune.select` chose.

    python -m finetune.sft --config configs/sft_tinyworld.yaml [--any_setting value]

A LoRA, or the whole U-Net, learns to draw what it is shown; before and after, held-out prompts are drawn, and judged if
there is a reward. Pictures may count by their predicted scores (`weight_by`) instead of, or besides, being filtered by
them. A YAML names code (`reward: package.module:Attribute`): run only those you trust.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import diffusers
import transformers
from rich.console import Console
from tqdm.auto import tqdm

transformers.logging.set_verbosity_error()  # says on import what does not concern us
transformers.logging.disable_progress_bar()
diffusers.logging.disable_progress_bar()

from finetune.pool import TABLES, fingerprint, open_pool  # noqa: E402
from finetune.run import (  # noqa: E402
    begin,
    claimed,
    judge,
    leave,
    load_policy,
    place_reward,
    read_schedule,
    run_settings,
    train,
)
from finetune.run_arguments import EvaluationArguments, PolicyArguments  # noqa: E402
from finetune.sft_config import SftConfig  # noqa: E402
from finetune.sft_data import TrainingPictures, make_buckets, read_weights  # noqa: E402
from finetune.sft_trainer import SftTrainer  # noqa: E402
from reward.arguments import main_guard, parse_arguments, read_prompt_file  # noqa: E402
from reward.by_name import check_reward_name, make_reward  # noqa: E402
from reward.feedback import RewardFn  # noqa: E402
from rl.adapter import AdapterSettings, check_adapter_files  # noqa: E402
from rl.evaluate import TRAINING_REWARD  # noqa: E402
from rl.model_card import Method  # noqa: E402
from rl.policy_checks import warn_of_ignored  # noqa: E402

SFT = Method(
    "supervised fine-tuning on pictures with prompts",
    ("supervised-fine-tuning",),
    reward_is="and looked at with the reward",
    curves={
        "loss": "loss",
        "error": "squared error, every picture and timestep alike",
        "grad_norm": "norm of the gradient",
        "learning_rate": "learning rate",
    },
)


@dataclass(kw_only=True)
class SftArguments(EvaluationArguments, PolicyArguments):
    """What is trained, on which pictures, and how it is judged. All else is in SftConfig."""

    data: str = field(
        metadata={
            "help": "Pictures with prompts: the folder `data` of `finetune.select`, any folder with metadata.jsonl or "
            "metadata.csv, a saved `datasets` data set, or folder of parquet files."
        }
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column of the prompts; default: text, prompt or caption."}
    )
    split: str = field(default="train", metadata={"help": "Which split of a saved data set or of parquet files."})
    reward: str | None = field(
        default=None,
        metadata={
            "help": "What the pictures were chosen by, `package.module:Attribute`; nothing is trained on it, but what "
            "is drawn before and after is judged by it, and its overlays are drawn. None: pictures without its figures."
        },
    )
    reward_kwargs: dict = field(default_factory=dict, metadata={"help": "Arguments of the reward's class."})

    def __post_init__(self):
        super().__post_init__()
        self.reward_kwargs = self.reward_kwargs or {}
        if not self.eval_prompts:
            warn_of_ignored(self, ("reward", "reward_kwargs"), "there are no eval_prompts")
        elif not self.reward:
            warn_of_ignored(self, ("reward_kwargs",), "there is no reward")

    def make_rewards(self) -> dict[str, RewardFn]:
        """What the policy is judged by; none is made before all are known to be. Empty without `eval_prompts`, and
        without a `reward` those of `eval_rewards` alone.

        Raises:
            ValueError: see `reward.by_name`.
        """
        if not self.eval_prompts:
            return {}
        if not self.reward:
            return self.make_eval_rewards()
        check_reward_name(self.reward, self.reward_kwargs)
        self.check_eval_rewards()
        return {TRAINING_REWARD: make_reward(self.reward, self.reward_kwargs)} | self.make_eval_rewards()


def main(argv: Sequence[str] | None = None) -> None:
    began = time.perf_counter()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    run, args = parse_arguments([SftArguments, SftConfig], argv)
    console = Console(quiet=not args.should_save, highlight=False)

    # Whatever can be wrong with the input is found out before the models are loaded.
    pool = open_pool(run.data, run.prompt_column, run.split)
    weights = read_weights(pool, args.weight_by, args.weight_temperature)
    eval_prompts = read_prompt_file(run.eval_prompts) if run.eval_prompts else []
    run.check_eval_strategy(args.eval_strategy.value)
    read_schedule(run.policy, args)
    check_adapter_files(args.part(AdapterSettings))
    table = next((str(pool.place / name) for name in TABLES if (pool.place / name).is_file()), None)
    settings = run_settings(run, args, {"data": table, "eval_prompts": run.eval_prompts})
    settings |= {"pictures (SHA-256 of names, prompts, sizes)": fingerprint(pool)}
    beginning = begin(args, settings, updates=1, console=console)
    if beginning.finished:
        return

    console.print("[bold]loading[/] policy and rewards")
    rewards = {name: place_reward(reward, args) for name, reward in run.make_rewards().items()}
    policy = load_policy(run.policy, args)
    pictures = TrainingPictures(pool, make_buckets(policy, args.aspect_buckets), weights)
    eval_on = run.held_out(eval_prompts, rewards) if eval_prompts else None
    trainer = SftTrainer(policy, pictures, args, eval_on=eval_on)
    if args.cache_latents:
        encode(trainer, console)

    before = judge("before", trainer, eval_prompts, rewards, run, console) if eval_prompts else None
    with claimed(trainer, settings, beginning):  # only now that nothing else can be wrong: it may delete what is there
        console.print(f"[bold]training[/] on {len(pictures)} pictures")
        train(trainer, beginning.checkpoint, console)
        after = judge("after", trainer, eval_prompts, rewards, run, console) if eval_prompts else None

        facts = {"pictures": len(pictures), "updates": trainer.state.global_step, "seed": args.seed}
        judged = (before, after) if before and after else None
        leave(trainer, settings, SFT, judged, facts, began, console)


def encode(trainer: SftTrainer, console: Console) -> None:
    """Keep the latents of all pictures, on all ranks."""
    args, pictures = trainer.args, trainer.pictures
    console.print(f"[bold]encoding[/] {len(pictures)} pictures")
    with tqdm(total=len(pictures), disable=args.disable_tqdm or not args.should_save, dynamic_ncols=True) as bar:
        pictures.encode(
            trainer.policy,
            args.per_device_train_batch_size,
            args.process_index,
            args.world_size,
            lambda count: bar.update(count * args.world_size),
        )


if __name__ == "__main__":
    main_guard(main)
