"""What a second rank gains on CPU: two ranks of one thread against one process of two, the same cores and pictures.

    python benchmarks/scaling.py [--quick] [--json FILE] [--seeds N]

The demo's pipeline, reward and settings; a rollout and its update, of which the first warms up and does not count. Runs
alternate, `--seeds` of each, so that the machine's moods meet both. Efficiency is the quotient of pictures a second,
its interval a bootstrap over the rollouts of both. Phases are the first rank's seconds a rollout; `wait` is what it
spends in gathering over ranks, waiting for the other included. The exchange of gradients is hidden in `update`, where
it overlaps with the backward pass.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from ddpo_speed import quotient
from report import Row, flags, publish

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs/ddpo_tinyworld.yaml"
GOAL = 0.85
BATCH = 32
PHASES = ("rollout", "decode", "reward", "watch", "update", "wait", "rest")


def run(settings: dict) -> None:
    """The child, on each rank: writes the seconds of each rollout but the first, in all and by phase."""
    import torch
    from wait_clock import RolloutCosts, WaitClock

    from finetune.run import load_policy, place_reward
    from reward.arguments import parse_arguments, read_prompt_file
    from rl.ddpo import DDPOConfig, DDPOTrainer
    from run_ddpo import RunArguments

    torch.set_num_threads(settings["threads"])
    ranks, pictures, output = settings["ranks"], settings["pictures"], settings["output"]
    with tempfile.TemporaryDirectory() as folder:
        changes = {
            "output_dir": folder, "num_train_epochs": settings["rollouts"] + 1, "generation_batch_size": pictures,
            "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": pictures // BATCH * 2 // ranks,
            "save_strategy": "no", "report_to": "none", "num_log_images": 0, "disable_tqdm": True, "eval_prompts": "",
            "eval_rewards": "{}", "log_level": "error",
        }  # fmt: skip
        argv = [part for name, value in changes.items() for part in (f"--{name}", str(value))]
        arguments, args = parse_arguments([RunArguments, DDPOConfig], ["--config", str(CONFIG), *argv])
        policy, reward = load_policy(arguments.policy, args), place_reward(arguments.make_reward(), args)
        trainer = DDPOTrainer(policy, reward, args, read_prompt_file(arguments.prompts))
        assert args.world_size == ranks, args.world_size
        trainer.clock = clock = WaitClock()
        trainer.accelerator.gather = clock.waiting(trainer.accelerator.gather)
        noted = RolloutCosts(clock)
        trainer.add_callback(noted)
        trainer.train()
    if args.should_save:
        Path(output).write_text(json.dumps(noted.costs[1:]))
    trainer.accelerator.wait_for_everyone()
    os._exit(0)  # now and then a rank aborts while its interpreter shuts down, after all is done


def child(settings: dict) -> list[dict[str, float]]:
    """The costs that a run of so many ranks notes."""
    launcher = [sys.executable]
    if settings["ranks"] > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={settings['ranks']}", "--rdzv_backend=c10d"]
        launcher += ["--rdzv_endpoint=localhost:0"]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "costs.json"
        command = [*launcher, __file__, "--child", json.dumps({**settings, "output": str(output)})]
        environment = {**os.environ, "OMP_NUM_THREADS": str(settings["threads"])}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{command} failed:\n{done.stderr[-3000:]}")
        return json.loads(output.read_text())


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return run(json.loads(sys.argv[2]))
    options = flags(__doc__.splitlines()[0]).parse_args()
    began = time.perf_counter()
    size = {"pictures": 2 * BATCH, "rollouts": 1} if options.quick else {"pictures": 8 * BATCH, "rollouts": 4}
    ways = {"one process": (1, 2), "two ranks": (2, 1)}
    costs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for repeat in range(1 if options.quick else options.seeds):
        order = list(ways.items())[:: 1 if repeat % 2 == 0 else -1]
        for name, (ranks, threads) in order:
            costs[name] += child({"ranks": ranks, "threads": threads, **size})
            print(f"{name}: {np.mean([cost['total'] for cost in costs[name]]):.2f} s a rollout", flush=True)
    one, two = ([cost["total"] for cost in costs[name]] for name in ways)
    rows = [
        Row(f"{name}, pictures a second", size["pictures"] / float(np.mean(total)), n=len(total))
        for name, total in zip(ways, (one, two), strict=True)
    ]
    rows.append(Row("efficiency of the second rank", *quotient(one, two), n=len(two), goal=f">= {GOAL}"))
    for name in ways:
        for phase in PHASES:
            seconds = [cost.get(phase, 0.0) for cost in costs[name]]
            rows.append(Row(f"{name}, seconds of {phase}", float(np.mean(seconds)), n=len(seconds)))
    publish(rows, began, options.json, options.quick)


if __name__ == "__main__":
    main()
