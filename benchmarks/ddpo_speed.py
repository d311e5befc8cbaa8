"""How fast a rollout and its update are, against TRL 0.23.1's DDPOTrainer, the last that TRL had.

    python benchmarks/ddpo_speed.py [--trl_python FILE] [--quick] [--json FILE] [--seeds N]

The same small pipeline, LoRA (rank 4 on attention: what TRL's pipeline fixes), pictures, steps, guidance, reward
(cheap, so that trainers are compared) and precision; every sampling step has noise and is trained, and a rollout makes
one update. The monitor `kl` is off, for TRL's trainer has none, and it asks the base model. Runs alternate, `--seeds`
of each, so that the machine's moods meet both; the value is the quotient of pictures a second, its interval a bootstrap
over the rollouts of both. Seconds a rollout are given by part: calls of the U-Net, in sampling and update, of the VAE's
decoder, and the backward pass (ours with the guidance's arithmetic, and the scaling of latents and pictures); "models'
share" is theirs in our wall time. What TRL's trainer draws is of as many prompts as pictures, ours of groups of 8, as
its advantages need them: our text encoder has less to do.

TRL needs older libraries: without `--trl_python` an environment is made in `build/trl_environment` on first use.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from report import Row, flags, publish

from reward.arguments import read_prompt_file

ROOT = Path(__file__).parents[1]
PINS = (
    "torch==2.13.0",
    "trl==0.23.1",
    "diffusers==0.35.2",
    "transformers==4.57.6",
    "peft==0.17.1",
    "accelerate==1.11.0",
)
GOAL, MODELS_GOAL = 1.5, 0.9
PARTS = ("network", "decode", "backward")
GUIDANCE = 2.0  # TRL's pipeline fails without guidance: it joins the empty prompt's embeddings to the others anyway


def trl_environment(folder: Path) -> Path:
    """A Python with TRL 0.23.1, made in `folder` if it is not there."""
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PINS], check=True)
        (folder / "complete").touch()
    return python


def stochastic_pipeline(folder: Path) -> str:
    """The small pipeline, with links to its weights, whose last sampling step has noise too, as TRL trains it."""
    source = (ROOT / "tinyworld/assets/sd").resolve()
    for part in source.iterdir():
        if part.name != "scheduler":
            (folder / part.name).symlink_to(part)
    (folder / "scheduler").mkdir()
    config = json.loads((source / "scheduler/scheduler_config.json").read_text())
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps({**config, "set_alpha_to_one": False}))
    return str(folder)


def ours(settings: dict) -> None:
    """The child that runs our trainer; prints the seconds of each rollout but the first, in all and by part."""
    import torch
    from ddpo_cost import CostOfRollouts

    from reward.feedback import Reward
    from rl.ddpo import DDPOConfig, DDPOTrainer
    from rl.policy import StableDiffusionPolicy

    torch.set_num_threads(settings["threads"])
    attention = ["to_k", "to_q", "to_v", "to_out.0"]
    with tempfile.TemporaryDirectory() as folder:
        args = DDPOConfig(
            output_dir=folder, use_cpu=True, num_train_epochs=settings["rollouts"] + 1, report_to=[], disable_tqdm=True,
            num_inference_steps=settings["steps"], guidance_scale=settings["guidance_scale"], train_steps=["all"],
            generation_batch_size=settings["batch"] * settings["batches"], num_generations=8,
            per_device_train_batch_size=settings["batch"], save_strategy="no", num_log_images=0, learning_rate=1e-3,
            gradient_accumulation_steps=settings["batches"] * settings["steps"], lora_rank=4, lora_alpha=4,
            lora_target_modules=attention, log_level="error", watch_limits={"kl": None},
        )  # fmt: skip
        policy = StableDiffusionPolicy.load(
            settings["pipeline"], lora_rank=4, lora_alpha=4, lora_target_modules=attention
        )
        trainer = DDPOTrainer(
            policy, lambda images, prompts: Reward(total=images[:, 0].mean(dim=(1, 2))), args, settings["prompts"]
        )
        assert len(trainer.train_steps) == settings["steps"], trainer.train_steps
        noted = CostOfRollouts(trainer)
        trainer.add_callback(noted)
        trainer.train()
    print(json.dumps([[cost.wall, {part: cost.work[part] for part in PARTS}] for cost in noted.costs[1:]]))


def child(command: list, settings: dict) -> list[tuple[float, dict[str, float]]]:
    """The last line that a child process prints, as JSON: of each rollout its seconds, in all and by part."""
    done = subprocess.run([*map(str, command), json.dumps(settings)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stderr[-3000:]}")
    return [(wall, work) for wall, work in json.loads(done.stdout.strip().splitlines()[-1])]


def quotient(theirs: list[float], own: list[float]) -> tuple[float, float, float]:
    """How many times as fast ours is, and its 95% bootstrap interval over rollouts."""
    rng = np.random.default_rng(0)
    theirs, own = np.array(theirs), np.array(own)
    drawn = [rng.choice(theirs, len(theirs)).mean() / rng.choice(own, len(own)).mean() for _ in range(10_000)]
    return float(theirs.mean() / own.mean()), *map(float, np.quantile(drawn, [0.025, 0.975]))


def rows_of(pictures: int, theirs: list[tuple[float, dict]], own: list[tuple[float, dict]]) -> list[Row]:
    """Of the rollouts of both, as `child` gives them, each of so many pictures."""
    rows, walls = [], {"TRL": [wall for wall, _ in theirs], "ours": [wall for wall, _ in own]}
    rows += [
        Row(f"{who}, pictures a second", pictures / float(np.mean(wall)), n=len(wall)) for who, wall in walls.items()
    ]
    rows.append(Row("ours / TRL", *quotient(walls["TRL"], walls["ours"]), n=len(own), goal=f">= {GOAL}"))
    share = sum(sum(work.values()) for _, work in own) / sum(walls["ours"])
    rows.append(Row("models' share of ours", share, n=len(own), goal=f">= {MODELS_GOAL}"))
    for who, costs in (("TRL", theirs), ("ours", own)):
        spent = {part: float(np.mean([work[part] for _, work in costs])) for part in PARTS}
        spent["everything else"] = float(np.mean(walls[who])) - sum(spent.values())
        rows += [Row(f"{who}, seconds of {part}", seconds, n=len(costs)) for part, seconds in spent.items()]
    return rows


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return ours(json.loads(sys.argv[2]))
    parser = flags(__doc__.splitlines()[0])
    parser.add_argument("--trl_python", type=Path, help="a Python that has TRL 0.23.1 (default: one is made)")
    parser.add_argument("--threads", type=int, default=2, help="of torch, in both")
    options = parser.parse_args()
    began = time.perf_counter()
    python = options.trl_python or trl_environment(ROOT / "build" / "trl_environment")
    settings = {
        "prompts": read_prompt_file("tinyworld/assets/prompts_train.txt")[:256], "batch": 32, "batches": 2,
        "guidance_scale": GUIDANCE, "steps": 4 if options.quick else 10, "rollouts": 1 if options.quick else 4,
        "threads": options.threads,
    }  # fmt: skip
    theirs, own = [], []
    with tempfile.TemporaryDirectory() as folder:
        settings["pipeline"] = stochastic_pipeline(Path(folder))
        for run in range(1 if options.quick else options.seeds):
            theirs += child([python, "benchmarks/trl_ddpo.py"], settings)
            own += child([sys.executable, "benchmarks/ddpo_speed.py", "--child"], settings)
            means = [float(np.mean([wall for wall, _ in costs])) for costs in (theirs, own)]
            print(f"{run + 1} runs of each: {means[0]:.2f} s and {means[1]:.2f} s", flush=True)
    rows = rows_of(settings["batch"] * settings["batches"], theirs, own)
    publish(rows, began, options.json, options.quick)


if __name__ == "__main__":
    main()
