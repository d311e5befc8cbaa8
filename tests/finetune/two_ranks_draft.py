"""The same small run as the test's by one engine after another, under torchrun: `two_ranks_draft.py PIPELINE FOLDER
ENGINE...`, an engine ddp or the name of a file in configs/deepspeed. Importing takes longer than a run."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from finetune.draft_config import DraftConfig
from finetune.draft_trainer import DraftTrainer
from rl.policy import StableDiffusionPolicy
from tests.rl.conftest import PROMPTS
from tests.rl.toy_rewards import Plain, Redness

pipeline, folder, engines = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
torch.set_num_threads(1)
for engine in engines:
    output = folder / engine
    deepspeed = None
    if engine.startswith("zero"):
        deepspeed = json.loads((Path(__file__).parents[2] / f"configs/deepspeed/{engine}.json").read_text())
    args = DraftConfig(
        output_dir=str(output), use_cpu=True, num_train_epochs=2, num_inference_steps=3,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, lora_rank=2, lora_alpha=4.0, disable_tqdm=True,
        report_to=[], seed=3, num_log_images=0, save_steps=1, optim="sgd", learning_rate=1.0, variant="draft",
        beta=0.1, region_weight=0.5, region_threshold=0.2, deepspeed=deepspeed,
    )  # fmt: skip
    policy = StableDiffusionPolicy.load(pipeline, lora_rank=2, lora_alpha=4.0, seed=3)
    trainer = DraftTrainer(policy, Redness(), args, PROMPTS, held_out=Plain())
    trainer.train()
    trainer.save_model()
    Path(f"{output}-watch-{trainer.args.process_index}.json").write_text(json.dumps(trainer.watch.state()))
    trainer.accelerator.wait_for_everyone()
    AcceleratorState._reset_state(reset_partial_state=True)
# About one run in ten, a rank aborts while its interpreter shuts down, after all is written, and torchrun reports a
# failure. What is tested is written by now: leave without that teardown.
os._exit(0)
