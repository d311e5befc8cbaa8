"""Trainings by DDPO on the small world, and what a judge that they never see says of them as they go.

    python benchmarks/trainings.py TRAINING.json RESULT.json

does one training; the benchmarks that compare trainings call it, once for each, on one thread. A training that is
finished is one small file in a folder, and is never repeated; one that was killed leaves nothing, and is done again.
These files are kept with the code: hours of work on several machines become one table, and anybody can look into it.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from long_runs import ROOT, Budget, assets_digest, digest, write_json
from transformers import TrainerCallback

from finetune.command_line import as_flags
from finetune.fingerprints import code
from finetune.run import load_policy
from reward.arguments import parse_arguments, read_prompt_file
from rl.ddpo import DDPOConfig, DDPOTrainer
from rl.evaluate import Evaluation, evaluate
from rl.timing import PhaseClock
from run_ddpo import RunArguments

CONFIG = "configs/ddpo_tinyworld.yaml"
HELD_OUT, TRAINED_ON = "tinyworld/assets/prompts_held_out.txt", "tinyworld/assets/prompts_train.txt"
JUDGE = "judge"
"""The evaluation's reward whose word counts."""
UNTRAINED = ("learning_rate", "credit", "focus_on", "focus_floor", "paid_scale", "paid_reach", "paid_weight", "epsilon",
             "epsilon_location", "importance_sampling_level", "num_train_epochs", "generation_batch_size",
             "per_device_train_batch_size", "gradient_accumulation_steps", "train_steps", "save_steps")  # fmt: skip
"""Settings that change nothing about the base model and how it is looked at."""
MODEL_WORK = ("rollout", "decode", "reward", "update")
"""The phases whose seconds are the training's own; watching is not."""


@dataclass(frozen=True, eq=False)
class Training:
    """What is trained, and how it is looked at; a dictionary's key by itself, not by what it says.

    Attributes:
        name: of what is compared.
        seed: of everything random in it; what it is judged by depends on no seed.
        changes: settings of run_ddpo.py in place of the config's.
        judged: file of the prompts that the judge looks at, `count` of them, evenly spread, a picture of each.
        every: rollouts from one look to the next; the first is before any update, the last behind all.
        evaluated: so many other prompts of that file are what the run itself is evaluated on at each look, for its
            monitors; as by `eval_strategy`.
        config: what the settings are, but for the changes.
    """

    name: str
    seed: int
    changes: Mapping[str, Any] = field(default_factory=dict)
    judged: str = HELD_OUT
    count: int = 256
    every: int = 3
    evaluated: int = 0
    config: str = CONFIG

    @property
    def file(self) -> str:
        """The name of its result's file: other settings or other assets, another file."""
        looked = self.name, self.seed, self.judged, self.count, self.every, self.evaluated
        key = digest(looked, self._settings, assets_digest())
        return f"{re.sub(r'[^a-z0-9]+', '_', self.name.lower())}-seed{self.seed}-{key}.json"

    @property
    def base_file(self) -> str:
        """The name of the file of the look at the base model, the same for every training that begins with it."""
        told = {name: value for name, value in self._settings.items() if name not in UNTRAINED}
        return f"base-{digest(told, self.judged, self.count, self.evaluated, assets_digest())}.json"

    @property
    def _settings(self) -> dict[str, Any]:
        """Of run_ddpo.py, the changes among them; where it leaves its files is none."""
        settings = yaml.safe_load((ROOT / self.config).read_text(encoding="utf-8")) | dict(self.changes)
        return {name: value for name, value in settings.items() if name != "output_dir"}

    def argv(self, output_dir: str) -> list[str]:
        """As the command line of run_ddpo.py, but for files that nobody would read."""
        quiet = {"output_dir": output_dir, "seed": self.seed, "save_strategy": "no", "report_to": "none",
                 "num_log_images": 0, "disable_tqdm": True}  # fmt: skip
        return ["--config", self.config, *as_flags(quiet | dict(self.changes))]


@dataclass(frozen=True)
class Result:
    """L looks at a training, at P prompts each.

    Attributes:
        rollouts, pictures: (L,), drawn for training before each look.
        seconds: (L,), of the processor, for the models' work before each look (`MODEL_WORK`): on one thread they are
            the wall's, and what runs beside it does not count.
        judge, satisfied: (L, P), the judge's score, and whether all is as asked for.
        reward: (L,), the mean of the reward trained on.
        evaluated: of each look what the run's own evaluation finds, for `rl.watch.Watch`; empty without one.
        watched: what was measured of each rollout, likewise.
        wall: seconds of it all, the looks included.
    """

    rollouts: np.ndarray
    pictures: np.ndarray
    seconds: np.ndarray
    judge: np.ndarray
    satisfied: np.ndarray
    reward: np.ndarray
    evaluated: Sequence[Mapping[str, Sequence[float]]]
    watched: Sequence[Mapping[str, float]]
    wall: float

    @classmethod
    def read(cls, file: Path) -> "Result":
        content = json.loads(file.read_text(encoding="utf-8"))
        evaluated = content["looks"].pop("evaluated")
        arrays = {name: np.array(value) for name, value in content["looks"].items()}
        return cls(**arrays, evaluated=evaluated, watched=content["watched"], wall=content["wall"])

    @property
    def gain(self) -> float:
        """By the judge's score, over the whole training."""
        return float(self.judge[-1].mean() - self.judge[0].mean())


class ProcessorClock(PhaseClock):
    """Counts the processor's seconds instead of the wall's."""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.process_time()
        try:
            yield
        finally:
            self.seconds[phase] += time.process_time() - start


class Looks(TrainerCallback):
    """Looks at the policy before every so many rollouts, and notes what `rl.watch` is told of each rollout.

    The first look is at the base model, from the same noise whatever the training: what `base` holds is not looked at
    again, and what it does not hold is left there.
    """

    def __init__(self, trainer: DDPOTrainer, rewards: Mapping[str, Any], prompts: Sequence[str],
                 evaluated: Sequence[str], run: RunArguments, every: int, base: Path | None):  # fmt: skip
        self.trainer, self.rewards, self.prompts, self.evaluated = trainer, rewards, prompts, evaluated
        self.run, self.every, self.base = run, every, base
        self.looks: dict[str, list] = {name: [] for name in ("rollouts", "pictures", "seconds", "judge", "satisfied",
                                                             "reward", "evaluated")}  # fmt: skip
        self.watched: list[dict[str, float]] = []
        observe = trainer.watch.observe

        def note(measured: Mapping[str, float], shared: Sequence[int] = ()) -> dict[str, float]:
            if "reward" in measured:  # the rollout's first
                self.watched.append({})
            self.watched[-1] |= measured
            return observe(measured, shared)

        trainer.watch.observe = note

    def on_epoch_begin(self, args, state, control, **kwargs):
        if (state.global_step // self.trainer.plan.updates) % self.every == 0:
            self.look()

    def look(self) -> None:
        trainer = self.trainer
        rollouts = trainer.state.global_step // trainer.plan.updates
        values = {
            "rollouts": rollouts,
            "pictures": rollouts * trainer.plan.pictures,
            "seconds": round(sum(trainer.clock.seconds.get(phase, 0.0) for phase in MODEL_WORK), 2),
        }
        if rollouts or self.base is None:
            values |= self._seen()
        else:
            if not self.base.is_file():
                write_json(self.base, self._seen())
            values |= json.loads(self.base.read_text(encoding="utf-8"))
        for name, value in values.items():
            self.looks[name].append(value)

    def _seen(self) -> dict[str, Any]:
        found = self._evaluate(self.prompts, self.rewards).values
        watched: dict[str, list[float]] = {}
        if self.evaluated:
            own = {name: one for name, one in self.rewards.items() if name in ("reward", self.run.watch_reward)}
            watched = self.trainer.seen_by_watch(self._evaluate(self.evaluated, own), own)
        return {
            "judge": [round(value, 4) for value in found[f"{JUDGE}.total"].flatten().tolist()],
            "satisfied": [round(value) for value in found[f"{JUDGE}.satisfied"].flatten().tolist()],
            "reward": float(found["reward"].mean()),
            "evaluated": {name: [round(value, 5) for value in values] for name, values in watched.items()},
        }

    def _evaluate(self, prompts: Sequence[str], rewards: Mapping[str, Any]) -> Evaluation:
        args = self.trainer.args
        return evaluate(
            self.trainer.policy, self.trainer.schedule, prompts, rewards, generations=1, seed=self.run.eval_seed,
            guidance_scale=args.guidance_scale, batch_size=args.per_device_eval_batch_size,
        )  # fmt: skip


def train(training: Training, work: Path | None = None) -> dict[str, Any]:
    """Do it; what `Result.read` reads.

    Args:
        work: the folder where trainings share their look at the base model; None: it is shared with none.
    """
    began, made_by = time.perf_counter(), code()
    with tempfile.TemporaryDirectory() as folder:
        run, args = parse_arguments([RunArguments, DDPOConfig], training.argv(folder))
        everything = read_prompt_file(training.judged)
        prompts = _spread(everything, training.count)
        evaluated = _spread([prompt for prompt in everything if prompt not in set(prompts)], training.evaluated)
        rewards = run.make_rewards()
        held_out = rewards[run.watch_reward] if run.watch_reward else None
        policy = load_policy(run.policy, args)
        trainer = DDPOTrainer(policy, rewards["reward"], args, read_prompt_file(run.prompts), held_out=held_out)
        trainer.clock = ProcessorClock()
        looks = Looks(trainer, rewards, prompts, evaluated, run, training.every, work and work / training.base_file)
        trainer.add_callback(looks)
        trainer.train()
        looks.look()
    wall = round(time.perf_counter() - began, 1)
    # Not in the file's name: work of days goes on while the code does.
    by = {"code": made_by, "machine": torch.backends.cpu.get_cpu_capability()}
    return {"training": asdict(training), "wall": wall, "looks": looks.looks, "watched": looks.watched, "by": by}


def _spread(prompts: Sequence[str], count: int) -> list[str]:
    """So many of them, evenly spread; all if there are fewer."""
    count = min(count, len(prompts))
    return [prompts[place * len(prompts) // count] for place in range(count)]


# ---- Many of them ----


def finish(
    trainings: Sequence[Training], work: Path, jobs: int, budget: Budget, failures: list[str] | None = None
) -> dict[Training, Result]:
    """Do those that are not done yet, in their order, as far as the budget goes.

    Args:
        failures: is told which failed; None: they are raised.

    Returns:
        All that are done, in the order of `trainings`.

    Raises:
        SystemExit: one failed; all others are done first.
    """
    there = results_of(trainings, work)
    for result in there.values():
        budget.note(result.wall)
    missing = [training for training in trainings if training not in there]
    done, lock = len(there), threading.Lock()
    failed: list[Training] = []

    def one(training: Training) -> None:
        nonlocal done
        if not budget.allows_another():
            return
        began = time.monotonic()
        if not start(training, work):
            failed.append(training)
            return
        with lock:
            budget.note(time.monotonic() - began)
            done += 1
            result = Result.read(work / training.file)
            before, after = result.judge[0].mean(), result.judge[-1].mean()
            print(
                f"{done} of {len(trainings)}: {training.name}, seed {training.seed}, "
                f"judge {before:.3f} -> {after:.3f}, {result.wall:.0f} s", flush=True,
            )  # fmt: skip

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, missing))
    told = [] if failures is None else failures
    told += [f"a training failed: {one.name}, seed {one.seed}; its error stands above" for one in failed]
    if failures is None and told:
        raise SystemExit("\n".join(told))
    return results_of(trainings, work)


def results_of(trainings: Sequence[Training], work: Path) -> dict[Training, Result]:
    return {training: Result.read(work / training.file) for training in trainings if (work / training.file).exists()}


def start(training: Training, work: Path) -> bool:
    """Do it in a process of its own, on one thread; whether it went well."""
    with tempfile.TemporaryDirectory() as folder:
        description = Path(folder) / "training.json"
        write_json(description, asdict(training))
        command = [sys.executable, __file__, str(description), str((work / training.file).absolute())]
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
        if ended.returncode != 0:
            print(ended.stderr, file=sys.stderr)
        return ended.returncode == 0


if __name__ == "__main__":
    wanted, file = map(Path, sys.argv[1:])
    write_json(file, train(Training(**json.loads(wanted.read_text(encoding="utf-8"))), file.parent))
