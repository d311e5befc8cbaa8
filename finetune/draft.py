"""Fine-tune a text-to-image pipeline by the gradient of a differentiable reward, back-propagated through sampling.

    python -m finetune.draft --config configs/draft_tinyworld.yaml [--any_setting value]

DRaFT, DRaFT-K, DRaFT-LV, AlignProp and ReFL are one setting (`variant`; see `finetune.backprop`); `region_weight` lets
only those places change in which the base model's picture has a problem (see `finetune.region_constraint`). A YAML
names code (`reward: package.module:Attribute`): run only those you trust.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import diffusers
import transformers
from rich.console import Console

transformers.logging.set_verbosity_error()  # says on import what does not concern us
transformers.logging.disable_progress_bar()
diffusers.logging.disable_progress_bar()

from finetune.draft_config import DraftConfig, check_differentiable  # noqa: E402
from finetune.draft_trainer import DraftTrainer  # noqa: E402
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
    watch_facts,
)
from finetune.run_arguments import RewardedRunArguments  # noqa: E402
from reward.arguments import main_guard, parse_arguments, read_prompt_file  # noqa: E402
from reward.feedback import RewardFn  # noqa: E402
from rl.adapter import AdapterSettings, check_adapter_files  # noqa: E402
from rl.evaluate import TRAINING_REWARD  # noqa: E402
from rl.model_card import Method  # noqa: E402

NAMES = {
    "draft": "DRaFT (Clark et al. 2023, arXiv 2309.17400)",
    "draft_k": "DRaFT-K (Clark et al. 2023, arXiv 2309.17400)",
    "draft_lv": "DRaFT-LV (Clark et al. 2023, arXiv 2309.17400)",
    "alignprop": "AlignProp (Prabhudesai et al. 2023, arXiv 2310.03739)",
    "refl": "ReFL (Xu et al. 2023, arXiv 2304.05977)",
}
"""What each variant is called in a model card."""


@dataclass(kw_only=True)
class RunArguments(RewardedRunArguments):
    """What is trained, on what, and how it is judged. All else is in DraftConfig."""


def main(argv: Sequence[str] | None = None) -> None:
    start = time.perf_counter()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    run, args = parse_arguments([RunArguments, DraftConfig], argv)
    console = Console(quiet=not args.should_save, highlight=False)

    # Whatever can be wrong with the input is found out before the models are loaded.
    prompts = read_prompt_file(run.prompts)
    eval_prompts = read_prompt_file(run.eval_prompts) if run.eval_prompts else []
    run.check_stop_on(args.stop_on)
    run.check_eval_strategy(args.eval_strategy.value)
    check_differentiable(run.named_rewards())
    args.check_schedule(read_schedule(run.policy, args))
    check_adapter_files(args.part(AdapterSettings))
    settings = run_settings(run, args, {"prompts": run.prompts, "eval_prompts": run.eval_prompts})
    beginning = begin(args, settings, updates=1, console=console)
    if beginning.finished:
        return

    console.print("[bold]loading[/] policy and rewards")
    rewards = place(run.make_rewards(), args)
    policy = load_policy(run.policy, args)
    held_out = rewards[run.watch_reward] if run.watch_reward else None
    eval_on = run.held_out(eval_prompts, rewards) if eval_prompts else None
    trainer = DraftTrainer(policy, rewards[TRAINING_REWARD], args, prompts, held_out=held_out, eval_on=eval_on)

    before = judge("before", trainer, eval_prompts, rewards, run, console) if eval_prompts else None
    with claimed(trainer, settings, beginning):  # only now that nothing else can be wrong: it may delete what is there
        console.print(f"[bold]training[/] for {args.total_updates} updates of {trainer.plan.pictures} pictures")
        train(trainer, beginning.checkpoint, console)
        after = judge("after", trainer, eval_prompts, rewards, run, console) if eval_prompts else None

        facts = {
            "updates": trainer.state.global_step,
            "pictures_per_update": trainer.plan.pictures,
            "pictures": trainer.state.global_step * trainer.plan.pictures,
            "seed": args.seed,
            "watch": watch_facts(trainer),
        }
        judged = (before, after) if before and after else None
        method = Method(NAMES[args.variant], (args.variant.replace("_", "-"), "reward-backpropagation"))
        leave(trainer, settings, method, judged, facts, start, console, best_checkpoint(trainer, run.watch_reward))


def place(rewards: dict[str, RewardFn], args: DraftConfig) -> dict[str, RewardFn]:
    """The rewards on their devices. The one trained on stays there: its model must be there in the backward pass."""
    trained = rewards[TRAINING_REWARD]
    if hasattr(trained, "to"):
        trained.to(args.device)
    others = {name: reward for name, reward in rewards.items() if name != TRAINING_REWARD}
    return {TRAINING_REWARD: trained} | {name: place_reward(reward, args) for name, reward in others.items()}


if __name__ == "__main__":
    main_guard(main)
