"""The same small run by one engine after another, under torchrun: `ranks.py PIPELINE FOLDER ENGINE... [-- FLAG...]`.

An engine is ddp or the name of a file in configs/deepspeed: three rollouts, and a checkpoint of each, with a LoRA's
dropout. A word behind it makes it two rollouts, one checkpoint and no dropout: `:full` trains the whole U-Net, `:text`
the text encoder too, where DeepSpeed goes on from a checkpoint behind the first, and then there are the names of
`WAYS`. What is noted of each goes to FOLDER/ENGINE/noted-RANK.pt. At the end, if there are flags, `run_ddpo.py
FLAG...`. Importing takes longer than a run, so one launch does them all.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

sys.path.insert(0, str(Path(__file__).parents[2]))

import run_ddpo
from reward.training_arguments import whole_models
from rl.adapter import AdapterSettings
from rl.ddpo import DDPOConfig, DDPOTrainer
from rl.policy import StableDiffusionPolicy
from tests.rl.conftest import PROMPTS
from tests.rl.toy_rewards import Plain, Redness

ROOT = Path(__file__).parents[2]
WAYS = {
    "across": {"num_generations": 8, "share_noise": "before"},
    "mask": {"credit": "mask"},
    "preset": {"bf16": True, "activation_checkpointing": True, "lora_dropout": 0.5},
    "prompt": {"advantage_baseline": "prompt", "prompt_buffer_size": 8, "prompt_min_count": 2},
    "auto": {
        "train_steps": ["auto:2"], "num_inference_steps": 4, "generation_batch_size": 16,
        "num_train_epochs": 3, "learning_rate": 4.0,
    },
}  # fmt: skip
"""What of the algorithm looks at all ranks' pictures: a group that lies across them, the largest value of all maps,
rewards by prompt, gradients; of these the first rollout makes the scale and the second chooses the third's steps. And
what the presets for GPUs set."""


def settings(folder: Path, engine: str, world_size: int) -> dict:
    """Rollouts of 8 pictures (or more) in 2 updates each, the second of which has moved away from the first; an update
    has all pictures, or which they are would depend on the ranks."""
    name, _, trained = engine.partition(":")
    way = WAYS.get(trained, {})
    full = trained == "full"
    deepspeed = None
    if name != "ddp":
        deepspeed = json.loads((ROOT / f"configs/deepspeed/{name}.json").read_text())
        if name.startswith("zero3"):  # or weights as small as these would not be sharded
            deepspeed["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    batch = min(4, 8 // world_size)
    accumulated = 2 * way.get("generation_batch_size", 8) // batch // world_size
    return {
        "output_dir": str(folder / engine), "use_cpu": True, "num_inference_steps": 3,
        "num_train_epochs": 2 if trained else 3, "save_strategy": "steps",
        "save_steps": 4 if trained not in ("", "text") else 2,
        "generation_batch_size": 8, "num_generations": 4, "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulated, "num_iterations": 2, "lora_rank": 2, "lora_alpha": 4.0,
        "disable_tqdm": True, "report_to": [], "seed": 3, "num_log_images": 0,
        "train_steps": ["0:2"], "optim": "sgd", "learning_rate": 0.003 if full else 0.02,
        "lora_dropout": 0.0 if trained else 0.25, "tune": "full" if full else "lora",
        "train_text_encoder": trained == "text", "deepspeed": deepspeed,
        **way,
    }  # fmt: skip


def train(pipeline: str, told: dict, drawn: list[torch.Tensor]) -> DDPOTrainer:
    """The trainer, when it is done; `drawn` gets the latents of each rollout."""
    args = DDPOConfig(**told)
    with whole_models(args):
        policy = StableDiffusionPolicy.load(pipeline, seed=3, **asdict(args.part(AdapterSettings)))
    trainer = DDPOTrainer(policy, Redness(), args, PROMPTS, held_out=Plain())
    collect = trainer.collect

    def noting(number):
        experience = collect(number)
        drawn.append(trainer.accelerator.gather(experience.trajectory.final_latents))
        return experience

    trainer.collect = noting
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    return trainer


def start_over() -> None:
    """Forget the engine, so that another one may follow."""
    torch.distributed.barrier()
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # accelerate leaves it there, and the next would obey


def run(pipeline: str, folder: Path, engine: str, world_size: int) -> dict:
    """One run; returns what must not depend on the engine, and two things that show which engine it was."""
    drawn: list[torch.Tensor] = []
    told = settings(folder, engine, world_size)
    if told["deepspeed"] and told["train_text_encoder"]:
        train(pipeline, told | {"num_train_epochs": 1}, drawn)
        start_over()
        told["resume_from_checkpoint"] = "latest"
    trainer = train(pipeline, told, drawn)
    trainer.save_model()
    return {
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "watch": trainer.watch.state(),
        "latents": torch.stack(drawn),
        "probe": trainer.probe and {"measured": torch.tensor(trainer.probe.state()), **trainer._sketch.state()},
        "steps": trainer.train_steps,
        "type": type(trainer.model_wrapped).__name__,
        "trained": sum(weight.numel() for weight in trainer.trained_weights()),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    pipeline, folder, engines = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    flags = engines[engines.index("--") + 1 :] if "--" in engines else []
    engines = engines[: -len(flags) - 1] if flags else engines
    for engine in engines:
        noted = run(pipeline, folder, engine, world_size)
        torch.save(noted, folder / engine / f"noted-{rank}.pt")
        start_over()
    if flags:
        run_ddpo.main(flags)
    else:
        torch.distributed.barrier()
    # About one run in ten, a rank aborts while its interpreter shuts down, after all is written, and torchrun reports
    # a failure. What is tested is written by now: leave without that teardown.
    os._exit(0)
