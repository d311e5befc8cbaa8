"""Fine-tune a text-to-image pipeline with a reward: policy, reward and trainer, composed from one YAML and flags.

    python run_ddpo.py --config configs/ddpo_tinyworld.yaml [--any_setting value]

A YAML names code (`reward: package.module:Attribute`): run only those you trust. Several rewards are weighed by
`rewards`; see `reward/by_name.py`.
"""

import difflib
import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import diffusers
import torch
import transformers
from accelerate import PartialState
from rich.console import Console
from tqdm.auto import tqdm

transformers.logging.set_verbosity_error()  # says on import what does not concern us
transformers.logging.disable_progress_bar()
diffusers.logging.disable_progress_bar()

from reward.arguments import main_guard, parse_arguments, read_prompt_file, whole_models  # noqa: E402
from reward.by_name import check_reward_name, make_reward, make_weighted_reward, read_named_rewards  # noqa: E402
from reward.feedback import RewardFn  # noqa: E402
from rl.adapter import AdapterSettings, check_adapter_files  # noqa: E402
from rl.checkpoints import claim_output_dir, explained, mark_finished, plan_start  # noqa: E402
from rl.ddpo import DDPOConfig, DDPOTrainer  # noqa: E402
from rl.ddpo_checks import warn_of_ignored  # noqa: E402
from rl.dry_run import measure, print_costs  # noqa: E402
from rl.evaluate import TRAINING_REWARD, Evaluation, evaluate, look  # noqa: E402
from rl.experience import Samples  # noqa: E402
from rl.interrupt import RunInterrupted  # noqa: E402
from rl.memory import MemorySettings, OffloadedReward  # noqa: E402
from rl.model_card import write_model_card  # noqa: E402
from rl.pipelines import load_scheduler  # noqa: E402
from rl.policy import PictureSize, StableDiffusionPolicy  # noqa: E402
from rl.report import print_table, write_report  # noqa: E402


@dataclass
class RunArguments:
    """What is trained, on what, and how it is judged. All else is in DDPOConfig."""

    policy: str = field(
        metadata={
            "help": "Folder of a Stable Diffusion pipeline (1.x, 2.x or XL) of diffusers, or the hub's name of one."
        }
    )
    prompts: str = field(metadata={"help": "Training prompts: a UTF-8 text file, one a line."})
    reward: str | None = field(
        default=None, metadata={"help": "The reward to train on, `package.module:Attribute`; a class is called."}
    )
    reward_kwargs: dict = field(default_factory=dict, metadata={"help": "Arguments of the reward's class."})
    rewards: dict = field(
        default_factory=dict,
        metadata={
            "help": "Instead of `reward`, a weighted sum: name -> {reward: `package.module:Attribute`, weight: 1.0, "
            "kwargs: {}}."
        },
    )
    eval_prompts: str | None = field(
        default=None, metadata={"help": "Held-out prompts, a file like `prompts`; none: no evaluation."}
    )
    eval_rewards: dict = field(
        default_factory=dict,
        metadata={
            "help": "More rewards to evaluate by, never trained on: name -> `package.module:Attribute`, or {reward:, "
            "kwargs:}."
        },
    )
    watch_reward: str | None = field(
        default=None,
        metadata={
            "help": "One of `eval_rewards`, by name, that also looks at every rollout: the held-out reward that tells "
            "whether the trained one is gamed (rl/watch.py), and which checkpoint is the best."
        },
    )
    eval_generations: int = field(default=2, metadata={"help": "Pictures of each held-out prompt."})
    eval_seed: int = field(default=0, metadata={"help": "Seed of the evaluation's noise, whatever `seed` is."})
    num_before_after: int = field(default=8, metadata={"help": "Pictures in before_after.png."})
    dry_run: bool = field(
        default=False,
        metadata={"help": "Measure one batch, say what the run would cost in memory and time, and write nothing."},
    )

    def __post_init__(self):
        self.rewards, self.eval_rewards = self.rewards or {}, self.eval_rewards or {}
        if bool(self.reward) == bool(self.rewards):
            which = "both are given" if self.reward else "neither is given"
            raise ValueError(
                f"`reward` names the one to train on, `rewards` a weighted sum of several: {which}; give one of them "
                "(on the command line, --reward '' or --rewards '{}' takes away what the YAML says)"
            )
        if self.rewards:
            warn_of_ignored(self, ("reward_kwargs",), "each of the `rewards` has kwargs of its own")
        read_named_rewards("rewards", self.rewards, weights=True)
        read_named_rewards("eval_rewards", self.eval_rewards, weights=False)
        if self.eval_generations < 1:
            raise ValueError(f"eval_generations is {self.eval_generations}; it must be at least 1")
        if self.num_before_after < 1:
            raise ValueError(f"num_before_after is {self.num_before_after}; it must be at least 1")
        if TRAINING_REWARD in self.eval_rewards:
            raise ValueError(
                f"eval_rewards must not use the name {TRAINING_REWARD!r}, the training reward's; rename it"
            )
        if self.watch_reward and self.watch_reward not in self.eval_rewards:
            near = difflib.get_close_matches(self.watch_reward, self.eval_rewards, n=1, cutoff=0.0)
            raise ValueError(
                f"watch_reward: there is no {self.watch_reward!r} among the eval_rewards"
                + (f" (nearest name: {near[0]!r})" if near else "; name it there")
            )
        if not self.eval_prompts:
            names = ("eval_generations", "eval_seed", "num_before_after")
            names += () if self.watch_reward else ("eval_rewards",)
            warn_of_ignored(self, names, "there are no eval_prompts")

    def make_reward(self) -> RewardFn:
        """The reward to train on.

        Raises:
            ValueError: see `reward.by_name`.
        """
        if self.rewards:
            return make_weighted_reward(read_named_rewards("rewards", self.rewards, weights=True))
        return make_reward(self.reward, self.reward_kwargs)

    def make_rewards(self) -> dict[str, RewardFn]:
        """The reward to train on, `TRAINING_REWARD`, and those to evaluate by; none is made before all are known to be.

        Raises:
            ValueError: see `reward.by_name`.
        """
        more = read_named_rewards("eval_rewards", self.eval_rewards, weights=False)
        for entry in more.values():
            check_reward_name(entry.reward, entry.kwargs)
        rewards = {TRAINING_REWARD: self.make_reward()}
        return rewards | {name: make_reward(entry.reward, entry.kwargs) for name, entry in more.items()}


def main(argv: Sequence[str] | None = None) -> None:
    start = time.perf_counter()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    run, args = parse_arguments([RunArguments, DDPOConfig], argv)
    console = Console(quiet=not args.should_save, highlight=False)

    # Whatever can be wrong with the input is found out before the models are loaded.
    prompts = read_prompt_file(run.prompts)
    eval_prompts = read_prompt_file(run.eval_prompts) if run.eval_prompts else []
    if "held_out" in args.stop_on and not run.watch_reward:
        raise ValueError("stop_on names held_out, but there is no such reward: name one of eval_rewards, watch_reward")
    check_schedule(run.policy, args)
    check_adapter_files(args.part(AdapterSettings))
    settings = asdict(run) | args.to_dict() | {"processes": args.world_size} | contents_of_files(run, args)
    begin = plan_start(
        args.resume_from_checkpoint, args.output_dir, settings, args.overwrite_output_dir, thorough=args.should_save
    )
    if begin.finished:
        console.print(f"nothing to do: the run in {args.output_dir} has finished", soft_wrap=True, markup=False)
        PartialState().destroy_process_group()
        return
    checkpoint = begin.checkpoint

    console.print("[bold]loading[/] policy and rewards")
    with whole_models(args):
        rewards = {name: place_reward(reward, args) for name, reward in run.make_rewards().items()}
        policy = load_policy(run, args)
    held_out = rewards[run.watch_reward] if run.watch_reward else None
    trainer = DDPOTrainer(policy, rewards[TRAINING_REWARD], args, prompts, held_out=held_out)

    if run.dry_run:
        costs = measure(trainer)  # on all ranks
        print_costs(console, costs)
        trainer.accelerator.end_training()
        return

    def judge(phase: str) -> tuple[Evaluation, Samples]:
        console.print(f"[bold]evaluating[/] {phase} training on {len(eval_prompts)} held-out prompts")
        noise = {"generations": run.eval_generations, "seed": run.eval_seed, "guidance_scale": args.guidance_scale}
        pictures = len(eval_prompts) * run.eval_generations
        bar = tqdm(total=pictures, disable=args.disable_tqdm or not args.should_save, dynamic_ncols=True)
        with trainer.accelerator.autocast(), bar:
            figures = evaluate(
                policy,
                trainer.schedule,
                eval_prompts,
                rewards,
                batch_size=args.per_device_eval_batch_size,
                reward_batch_size=args.reward_batch_size,
                rank=args.process_index,
                world_size=args.world_size,
                gather=trainer.accelerator.gather,
                on_batch=lambda count: bar.update(count * args.world_size),
                **noise,
            )
            reward = rewards[TRAINING_REWARD]
            samples = look(policy, trainer.schedule, eval_prompts, reward, count=run.num_before_after, **noise)
        return figures, samples

    before = judge("before") if eval_prompts else None
    if args.should_save:  # only now that nothing else can be wrong: this deletes what is there, if it may
        claim_output_dir(args.output_dir, settings, resume=begin.keep)
    console.print(f"[bold]training[/] for {trainer.total_rollouts} rollouts of {trainer.plan.pictures} pictures")
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except RunInterrupted as interruption:
        console.print(str(interruption), soft_wrap=True, markup=False)
        raise
    trainer.save_model()  # on all ranks: an engine may have to gather the weights
    after = judge("after") if eval_prompts else None
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()  # a rank that exits with its process group open may abort

    if not args.should_save:
        return
    stopped_by = trainer.watch.stopping if trainer.state.global_step < trainer.state.max_steps else []
    best = trainer.watch.best and {"path": str(trainer.best_checkpoint), **trainer.watch.best}
    seconds = trainer.clock.summary(trainer.train_seconds)
    paths = {policy.trained.what: Path(args.output_dir), "TensorBoard logs": Path(args.output_dir) / "runs"}
    if best:
        paths[f"best checkpoint by {run.watch_reward}, {best['held_out']:.4f} in its rollout"] = best["path"]
    if before and after:
        facts = {
            "seconds": seconds,
            "wall_seconds": time.perf_counter() - start,
            "rollouts": trainer.state.global_step // trainer.plan.updates,
            "updates": trainer.state.global_step,
            "pictures_per_rollout": trainer.plan.pictures,
            "seed": args.seed,
            "watch": {"over": trainer.watch.over, "stopped_by": stopped_by, "best_checkpoint": best},
        }
        figures = (before[0], after[0])
        with explained(f"the report to {args.output_dir}", args.output_dir):
            paths |= write_report(args.output_dir, *figures, samples=(before[1], after[1]), facts=facts)
        print_table(console, *figures)
    with explained(f"the model card to {args.output_dir}", args.output_dir):
        history = trainer.state.log_history
        paths |= write_model_card(args.output_dir, settings, history, (before[0], after[0]) if before else None)
    if args.push_to_hub:
        trainer.push_to_hub()
    mark_finished(args.output_dir, trainer.state.global_step)
    console.print("seconds of training: " + json.dumps({name: round(value, 1) for name, value in seconds.items()}))
    for what, path in paths.items():
        console.print(f"{what}: {path}", soft_wrap=True, markup=False)
    console.print(
        f"To use it: {policy.trained.usage(args.output_dir)}; to watch: tensorboard --logdir {args.output_dir}",
        soft_wrap=True,
        markup=False,
    )


def load_policy(run: RunArguments, args: DDPOConfig) -> StableDiffusionPolicy:
    return StableDiffusionPolicy.load(
        run.policy,
        seed=args.seed,
        dtype=getattr(torch, args.model_dtype),
        size=args.part(PictureSize),
        memory=args.part(MemorySettings),
        keep_reference=args.beta > 0,
        **asdict(args.part(AdapterSettings)),
    )


def contents_of_files(run: RunArguments, args: DDPOConfig) -> dict[str, str]:
    """SHA-256 of the files that settings name: with other contents it is another run."""
    files = {"prompts": run.prompts, "eval_prompts": run.eval_prompts, "deepspeed": args.deepspeed}
    return {
        f"{setting} (SHA-256)": hashlib.sha256(Path(file).read_bytes()).hexdigest()
        for setting, file in files.items()
        if isinstance(file, str) and Path(file).is_file()
    }


def place_reward(reward: RewardFn, args: DDPOConfig) -> RewardFn:
    """The reward with its model, if it has one, where `args` want it."""
    if not hasattr(reward, "to"):
        return reward
    if args.offload and args.device.type != "cpu":
        return OffloadedReward(reward, args.device)
    reward.to(args.device)
    return reward


def check_schedule(policy: str, args: DDPOConfig) -> None:
    """Complain about settings that do not fit the pipeline or each other, from its scheduler alone."""
    scheduler = load_scheduler(policy)
    if scheduler is not None:
        _, schedule = args.make_schedule(scheduler)
        args.plan(args.steps_per_rollout(schedule))


if __name__ == "__main__":
    main_guard(main)
