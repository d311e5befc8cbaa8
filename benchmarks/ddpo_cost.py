"""What a rollout and update of 64 pictures costs, and how much of it is the models' own work.

    python benchmarks/ddpo_cost.py [--config configs/ddpo_tinyworld.yaml] [--quick] [--json FILE]

The calls that do a model's work are timed one by one, wherever they are made from: the policy's network (in sampling
and, with gradients, in the update), the decoder, the reward, and the backward pass. What is left is ours: schedules,
noise, advantages, the optimizer, logs. The first rollout warms up and does not count.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from report import Row, flags, publish
from transformers import TrainerCallback

from finetune.run import load_policy
from reward.arguments import parse_arguments, read_prompt_file
from rl.ddpo import DDPOConfig, DDPOTrainer
from rl.timing import PhaseClock
from run_ddpo import RunArguments

PICTURES = 64
ROLLOUTS = 3
WORK = ("network", "decode", "reward", "backward")


@dataclass(frozen=True)
class Cost:
    """Seconds of one rollout and its update: in all, and of each kind of `WORK`."""

    wall: float
    work: dict[str, float]


def timed(function: Callable, clock: PhaseClock, kind: str) -> Callable:
    def call(*args, **kwargs):
        with clock(kind):
            return function(*args, **kwargs)

    return call


class CostOfRollouts(TrainerCallback):
    """Notes the cost of every rollout with its update; from when it is made, a trainer's model calls are timed."""

    def __init__(self, trainer: DDPOTrainer):
        self.clock = PhaseClock()
        self.costs: list[Cost] = []
        trainer.policy.predict = timed(trainer.policy.predict, self.clock, "network")
        trainer.policy.decode = timed(trainer.policy.decode, self.clock, "decode")
        trainer.reward_fn = timed(trainer.reward_fn, self.clock, "reward")
        trainer.accelerator.backward = timed(trainer.accelerator.backward, self.clock, "backward")

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.clock.seconds.clear()
        self.began = time.perf_counter()

    def on_epoch_end(self, args, state, control, **kwargs):
        wall = time.perf_counter() - self.began
        self.costs.append(Cost(wall, {kind: self.clock.seconds[kind] for kind in WORK}))


def make_trainer(config: Path, rollouts: int, output_dir: str) -> DDPOTrainer:
    """A trainer by the settings of `config`, but with `PICTURES` pictures and one update a rollout, and no files."""
    changes = {
        "generation_batch_size": PICTURES, "per_device_train_batch_size": PICTURES, "num_train_epochs": rollouts,
        "save_strategy": "no", "report_to": "none", "num_log_images": 0, "disable_tqdm": "true",
        "output_dir": output_dir,
    }  # fmt: skip
    argv = ["--config", str(config), *(text for name, value in changes.items() for text in (f"--{name}", str(value)))]
    run, args = parse_arguments([RunArguments, DDPOConfig], argv)
    policy, reward = load_policy(run.policy, args), run.make_reward()
    _, schedule = args.make_schedule(policy.scheduler)
    args.gradient_accumulation_steps = args.steps_per_rollout(schedule)
    if hasattr(reward, "to"):
        reward.to(args.device)
    return DDPOTrainer(policy, reward, args, read_prompt_file(run.prompts))


def measure(config: Path, rollouts: int) -> list[Cost]:
    """The cost of each of `rollouts` rollouts, behind one that warms up."""
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = make_trainer(config, 1 + rollouts, output_dir)
        noted = CostOfRollouts(trainer)
        trainer.add_callback(noted)
        trainer.train()
    return noted.costs[1:]


def main() -> None:
    parser = flags(__doc__.splitlines()[0], seeds=None)
    parser.add_argument("--config", type=Path, default=Path("configs/ddpo_tinyworld.yaml"))
    options = parser.parse_args()
    began = time.perf_counter()
    costs = measure(options.config, 1 if options.quick else ROLLOUTS)
    pictures = PICTURES * len(costs)
    wall = sum(cost.wall for cost in costs)
    work = {kind: sum(cost.work[kind] for cost in costs) for kind in WORK}
    rows = [Row(f"seconds for {PICTURES} pictures", wall / len(costs), n=pictures, goal="<= 6.5")]
    rows += [Row(f"seconds, {kind}", seconds / len(costs), n=pictures) for kind, seconds in work.items()]
    rows.append(Row("seconds, everything else", (wall - sum(work.values())) / len(costs), n=pictures))
    rows.append(Row("share of the models' work", sum(work.values()) / wall, n=pictures, goal=">= 0.85"))
    publish(rows, began, options.json, options.quick)


if __name__ == "__main__":
    main()
