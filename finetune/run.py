"""What the commands that train a policy have in common: loading, evaluation before and after, what a run leaves.

A command's `main` calls these one after another; the training between them is its own.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from tqdm.auto import tqdm

from finetune.run_arguments import EvaluationArguments
from reward.feedback import Reward, RewardError, RewardFn
from reward.folder_lock import check_free, held
from rl.adapter import AdapterSettings
from rl.callbacks import show_at_end
from rl.checkpoints import Start, claim_output_dir, explained, mark_finished, plan_start, restore_before
from rl.going_on import check_goes_on
from rl.interrupt import RunInterrupted
from rl.memory import MemorySettings, OffloadedReward
from rl.model_card import Method, write_model_card
from rl.pictures import before_after_sheet
from rl.pipelines import load_scheduler, picture_size
from rl.policy import PictureSize, StableDiffusionPolicy
from rl.policy_config import PolicyConfig
from rl.policy_trainer import Judged, PolicyTrainer
from rl.report import print_table, write_report
from rl.scoring import score
from rl.sde import Schedule

# ---- Before the models are loaded ----


def read_schedule(policy: str, args: PolicyConfig) -> Schedule:
    """The sampling steps of a pipeline, from its scheduler alone.

    Raises:
        ValueError: there is no such pipeline, or it is of a family that is not supported, or `args` do not fit it.
    """
    return args.make_schedule(load_scheduler(policy))[1]


def run_settings(arguments: object, args: PolicyConfig, files: Mapping[str, str | None]) -> dict[str, Any]:
    """What makes a run the run it is: all its settings, and the contents of the files that some of them name.

    Args:
        arguments: the command's own, a dataclass.
        files: setting -> the file it names; with other contents it is another run.
    """
    contents = {
        f"{setting} (SHA-256)": hashlib.sha256(Path(file).read_bytes()).hexdigest()
        for setting, file in (dict(files) | {"deepspeed": args.deepspeed}).items()
        if isinstance(file, str) and Path(file).is_file()
    }
    return asdict(arguments) | args.to_dict() | {"processes": args.world_size} | contents


def begin(args: PolicyConfig, settings: Mapping[str, Any], updates: int, console: Console) -> Start:
    """How the run starts, see `rl.checkpoints.plan_start`. If it has finished already, that is said.

    Args:
        updates: between two places where it can stop.

    Raises:
        ValueError: it may not start there, or cannot go on from there; or DeepSpeed lacks a launcher.
    """
    if args.deepspeed and "RANK" not in os.environ:
        raise ValueError(
            "deepspeed trains in processes that a launcher starts, a single one too: accelerate launch, or torchrun "
            f"--nproc_per_node 1 {args.command} ..."
        )
    if args.should_save:
        check_free(args.output_dir)
        restore_before(args.output_dir)  # of a run that was killed before its first update
    PartialState().wait_for_everyone()
    start = plan_start(
        args.resume_from_checkpoint, args.output_dir, settings, args.overwrite_output_dir, thorough=args.should_save
    )
    if start.finished:
        console.print(f"nothing to do: the run in {args.output_dir} has finished", soft_wrap=True, markup=False)
        PartialState().destroy_process_group()
        return start
    if start.checkpoint is not None:
        check_goes_on(start.checkpoint, args, updates)
    return start


# ---- Models ----


def load_policy(path: str, args: PolicyConfig) -> StableDiffusionPolicy:
    """The policy as `args` want it; see `StableDiffusionPolicy.load`."""
    return StableDiffusionPolicy.load(
        path,
        seed=args.seed,
        dtype=getattr(torch, args.model_dtype),
        size=args.part(PictureSize),
        memory=args.part(MemorySettings),
        keep_reference=args.needs_reference,
        **asdict(args.part(AdapterSettings)),
    )


def place_reward(reward: RewardFn, args: PolicyConfig) -> RewardFn:
    """The reward with its model, if it has one, where `args` want it."""
    if not hasattr(reward, "to"):
        return reward
    if args.offload and args.device.type != "cpu":
        return OffloadedReward(reward, args.device)
    reward.to(args.device)
    return reward


def try_rewards(rewards: Mapping[str, RewardFn], policy: str, args: PolicyConfig, prompt: str) -> dict[str, Reward]:
    """Ask each reward about two grey pictures, as large as the policy's, before the policy is loaded and draws any. Of
    one alone, a mean over the batch would look like a total for each.

    Returns:
        name -> what it says of it.

    Raises:
        ValueError: names the reward whose answer cannot be trained on, and what is wrong with it.
    """
    try:
        size = picture_size(policy, args.resolution)
    except OSError:  # of a name on the hub that is not there; loading it says so
        size = (512, 512)
    grey, said = torch.full((2, 3, *size), 0.5, device=args.device), {}
    for name, reward in rewards.items():
        try:
            said[name] = score(reward, grey, [prompt, prompt], args.reward_batch_size)
        except RewardError as error:
            raise ValueError(f"asked about two grey pictures, the reward {name!r} fails: {error}") from error
    return said


# ---- The run ----


def judge(
    phase: str,
    trainer: PolicyTrainer,
    prompts: Sequence[str],
    rewards: Mapping[str, RewardFn],
    how: EvaluationArguments,
    console: Console,
) -> Judged:
    """Evaluate the trainer's policy, on all ranks; what is before training, its monitors hold later ones against.

    Args:
        phase: "before" or "after", for the console.
        prompts: held-out ones.
        rewards: name -> reward function; the one trained on, if there is one, is called `TRAINING_REWARD`.
    """
    args, held_out = trainer.args, how.held_out(prompts, rewards)
    console.print(f"[bold]evaluating[/] {phase} training on {len(prompts)} held-out prompts")
    pictures = len(prompts) * how.eval_generations
    bar = tqdm(total=pictures, disable=args.disable_tqdm or not args.should_save, dynamic_ncols=True)
    try:
        with bar:
            judged = trainer.judge(held_out, on_batch=lambda count: bar.update(count * args.world_size))
    except KeyboardInterrupt:
        if phase == "after":
            console.print(
                f"what was trained lies in {args.output_dir}; the same command with --resume_from_checkpoint auto goes "
                "on with this evaluation",
                soft_wrap=True, markup=False,
            )  # fmt: skip
        raise
    if phase == "before":
        trainer.watch_evaluation(judged[0], rewards)
    return judged


@contextmanager
def claimed(trainer: PolicyTrainer, settings: Mapping[str, Any], start: Start) -> Iterator[None]:
    """Inside, the output folder is this run's alone; on all ranks. What another run left there is set aside, if it may,
    and comes back where this one fails before its first update; else it is deleted.

    Raises:
        FolderInUseError: another run is still writing there.
        ValueError: a rank does not see the folder.
    """
    output_dir, first = trainer.args.output_dir, trainer.args.should_save

    def claim() -> None:
        claim_output_dir(output_dir, settings, resume=start.keep)

    with held(output_dir, first, trainer.accelerator.wait_for_everyone, claim):
        try:
            yield
        except BaseException:
            if first:
                restore_before(output_dir)
            raise


def train(trainer: PolicyTrainer, checkpoint: Path | None, console: Console) -> None:
    """Say which monitors are off, and why; train, from a checkpoint if there is one, and save what was trained; on all
    ranks.

    Raises:
        RunInterrupted: see `ResumableTrainer.train`; it is said on the console.
    """
    if trainer.watch.off:
        off = "; ".join(f"{name} ({why})" for name, why in trainer.watch.off.items())
        console.print(f"monitors that are off: {off}", soft_wrap=True, markup=False)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except RunInterrupted as interruption:
        console.print(str(interruption), soft_wrap=True, markup=False)
        raise
    trainer.save_model()  # on all ranks: an engine may have to gather the weights


def leave(
    trainer: PolicyTrainer,
    settings: Mapping[str, Any],
    method: Method,
    judged: tuple[Judged, Judged] | None,
    facts: Mapping[str, Any],
    began: float,
    console: Console,
    more_paths: Mapping[str, Path | str] | None = None,
) -> None:
    """Write what a run leaves besides weights - report, model card, the note that it has finished - and say where.

    Called on all ranks, behind the last evaluation; it ends the process group.

    Args:
        settings: of the run, as `run_settings` gives them.
        judged: before and after; None if there was no evaluation.
        facts: more entries of summary.json.
        began: `time.perf_counter()` at the command's start.
        more_paths: what else there is to name at the end.
    """
    args, what = trainer.args, trainer.policy.trained
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()  # a rank that exits with its process group open may abort
    if not args.should_save:
        return
    seconds = trainer.clock.summary(trainer.train_seconds)
    paths = {what.what: Path(args.output_dir), "TensorBoard logs": Path(args.output_dir) / "runs"}
    paths |= more_paths or {}
    figures = None
    if judged:
        (before, old_samples), (after, new_samples) = judged
        facts = {"seconds": seconds, "wall_seconds": time.perf_counter() - began, **facts}
        figures = before, after
        with explained(f"the report to {args.output_dir}", args.output_dir):
            paths |= write_report(args.output_dir, *figures, samples=(old_samples, new_samples), facts=facts)
        show_at_end(trainer, "before_after", before_after_sheet(old_samples, new_samples))
        print_table(console, *figures)
    named = settings | {"hub_model_id": trainer.hub_model_id} if args.push_to_hub else settings
    with explained(f"the model card to {args.output_dir}", args.output_dir):
        paths |= write_model_card(args.output_dir, named, trainer.state.log_history, figures, method)
    mark_finished(args.output_dir, trainer.state.global_step)
    console.print("seconds of training: " + json.dumps({name: round(value, 1) for name, value in seconds.items()}))
    for what_it_is, path in paths.items():
        console.print(f"{what_it_is}: {path}", soft_wrap=True, markup=False)
    console.print(
        f"To use it: {what.usage(args.output_dir)}; to watch: tensorboard --logdir {args.output_dir}",
        soft_wrap=True,
        markup=False,
    )
    if args.push_to_hub:
        trainer.push_to_hub()


def watch_facts(trainer: PolicyTrainer) -> dict[str, Any]:
    """What summary.json says of the monitors: those over their limits, those that ended the run, the checkpoint that is
    kept, and the one whose weights are left in place of the last update's (None: the last update's are)."""
    stopped_by = trainer.watch.stopping if trainer.state.global_step < trainer.state.max_steps else []
    best = trainer.watch.best and {"path": str(trainer.best_checkpoint), **trainer.watch.best}
    left = trainer.left and str(trainer.left)
    return {"over": trainer.watch.over, "stopped_by": stopped_by, "best_checkpoint": best, "left": left}


def best_checkpoint(trainer: PolicyTrainer, watch_reward: str | None) -> dict[str, str]:
    """What the checkpoint that is kept is -> its path, for the console; nothing if there is none. Without a held-out
    reward it is named where a monitor is over its limit: else it is as good as the last update."""
    best = trainer.watch.best
    if best and "held_out" in best:
        where = "evaluation" if best.get("evaluated") else "rollout"
        what = f"best checkpoint by {watch_reward}, {best['held_out']:.4f} in its {where}"
    elif best and trainer.watch.over:
        what = "last checkpoint without a monitor over its limit"
    else:
        return {}
    return {what: str(trainer.best_checkpoint)}
