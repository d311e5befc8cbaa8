"""Fine-tune a text-to-image pipeline with a reward: policy, reward and trainer, composed from one YAML and flags.

    python run_ddpo.py --config configs/ddpo_tinyworld.yaml [--any_setting value]

A YAML names code (`reward: package.module:Attribute`): run only those you trust. Several rewards are weighed by
`rewards`; see `reward/by_name.py`.
"""

import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import diffusers
import transformers
from rich.console import Console

transformers.logging.set_verbosity_error()  # says on import what does not concern us
transformers.logging.disable_progress_bar()
diffusers.logging.disable_progress_bar()

from finetune.reward_choice import given_by  # noqa: E402
from finetune.run import (  # noqa: E402
    begin,
    best_checkpoint,
    claimed,
    judge,
    leave,
    load_policy,
    place_reward,
    read_schedule,
    run_settings,
    train,
    try_rewards,
    watch_facts,
)
from finetune.run_arguments import RewardedRunArguments  # noqa: E402
from reward.arguments import main_guard, parse_arguments, read_prompt_file  # noqa: E402
from reward.feedback import RewardFn  # noqa: E402
from reward.training_arguments import whole_models  # noqa: E402
from rl.adapter import AdapterSettings, check_adapter_files  # noqa: E402
from rl.ddpo import DDPOConfig, DDPOTrainer  # noqa: E402
from rl.dry_run import measure, print_costs  # noqa: E402
from rl.evaluate import TRAINING_REWARD  # noqa: E402
from rl.experience import check_credit_is_told, told_by  # noqa: E402
from rl.model_card import DDPO  # noqa: E402


@dataclass(kw_only=True)
class RunArguments(RewardedRunArguments):
    """What is trained, on what, and how it is judged. All else is in DDPOConfig."""

    dry_run: bool = field(
        default=False,
        metadata={"help": "Measure one batch, say what the run would cost in memory and time, and write nothing."},
    )


def main(argv: Sequence[str] | None = None) -> None:
    start = time.perf_counter()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    run, args = parse_arguments([RunArguments, DDPOConfig], argv)
    console = Console(quiet=not args.should_save, highlight=False)

    # Whatever can be wrong with the input is found out before the models are loaded.
    prompts = read_prompt_file(run.prompts)
    eval_prompts = read_prompt_file(run.eval_prompts) if run.eval_prompts else []
    run.check_stop_on(args.stop_on)
    run.check_eval_strategy(args.eval_strategy.value)
    plan = args.plan(args.steps_per_rollout(read_schedule(run.policy, args)))
    if (given := given_by(run.named_rewards())) is not None:
        check_credit_is_told(args, given)
    run.check_eval_rewards()
    check_adapter_files(args.part(AdapterSettings))
    settings = run_settings(run, args, {"prompts": run.prompts, "eval_prompts": run.eval_prompts})
    if run.dry_run:
        dry_run(run, args, prompts, eval_prompts, console)
        return
    beginning = begin(args, settings, plan.updates, console)
    if beginning.finished:
        return

    trainer, rewards = load(run, args, prompts, eval_prompts, console)

    before = judge("before", trainer, eval_prompts, rewards, run, console) if eval_prompts else None
    with claimed(trainer, settings, beginning):  # only now that nothing else can be wrong: it may delete what is there
        console.print(f"[bold]training[/] for {trainer.total_rollouts} rollouts of {trainer.plan.pictures} pictures")
        train(trainer, beginning.checkpoint, console)
        after = judge("after", trainer, eval_prompts, rewards, run, console) if eval_prompts else None

        facts = {
            "rollouts": trainer.state.global_step // trainer.plan.updates,
            "updates": trainer.state.global_step,
            "pictures_per_rollout": trainer.plan.pictures,
            "seed": args.seed,
            "watch": watch_facts(trainer),
        }
        judged = (before, after) if before and after else None
        leave(trainer, settings, DDPO, judged, facts, start, console, best_checkpoint(trainer, run.watch_reward))


def load(
    run: RunArguments, args: DDPOConfig, prompts: Sequence[str], eval_prompts: Sequence[str], console: Console
) -> tuple[DDPOTrainer, dict[str, RewardFn]]:
    """The trainer, with all that it trains and asks, and the rewards by name."""
    console.print("[bold]loading[/] policy and rewards")
    with whole_models(args):
        rewards = {name: place_reward(reward, args) for name, reward in run.make_rewards().items()}
        said = try_rewards(rewards, run.policy, args, prompts[0])
        check_credit_is_told(args, told_by(said[TRAINING_REWARD]))
        policy = load_policy(run.policy, args)
    held_out = rewards[run.watch_reward] if run.watch_reward else None
    eval_on = run.held_out(eval_prompts, rewards) if eval_prompts else None
    trainer = DDPOTrainer(policy, rewards[TRAINING_REWARD], args, prompts, held_out=held_out, eval_on=eval_on)
    return trainer, rewards


def dry_run(
    run: RunArguments, args: DDPOConfig, prompts: Sequence[str], eval_prompts: Sequence[str], console: Console
) -> None:
    """Say what the run would cost, on all ranks; its folder is not touched, whatever lies there."""
    with tempfile.TemporaryDirectory() as folder:  # a Trainer makes the one that it is given
        args.output_dir, args.push_to_hub = folder, False
        trainer, _ = load(run, args, prompts, eval_prompts, console)
        print_costs(console, measure(trainer))
        trainer.accelerator.end_training()


if __name__ == "__main__":
    main_guard(main)
