"""One run of TRL 0.23.1's DDPOTrainer, timed; runs in an environment of its own, started by `ddpo_speed.py`.

    python benchmarks/trl_ddpo.py '{"pipeline": ..., "prompts": [...], "batch": 32, "batches": 2, "steps": 10, ...}'

Prints one line of JSON: seconds of each rollout with its update, the first (a warm-up) left out, in all and by part.
"""

import json
import sys
import tempfile
import time
import warnings

warnings.filterwarnings("ignore")

import torch  # noqa: E402
from accelerate import PartialState  # noqa: E402

settings = json.loads(sys.argv[1])
torch.set_num_threads(settings["threads"])
PartialState(cpu=True)  # before TRL makes its Accelerator, which would otherwise look for a GPU

from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline  # noqa: E402

prompts = settings["prompts"]
drawn = 0


def next_prompt():
    global drawn
    drawn += 1
    return prompts[drawn % len(prompts)], {}


def redness(images, prompts, metadata):
    return images[:, 0].float().mean(dim=(1, 2)), {}


work: dict[str, float] = {}


def timed(part, function):
    def call(*args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        work[part] = work.get(part, 0.0) + time.perf_counter() - start
        return result

    return call


with tempfile.TemporaryDirectory() as folder:
    pipeline = DefaultDDPOStableDiffusionPipeline(settings["pipeline"], use_lora=True)
    config = DDPOConfig(
        num_epochs=1,
        save_freq=10**9,
        project_kwargs={"project_dir": folder},
        seed=0,
        mixed_precision="no",  # as ours; its default is float16, which is many times slower on a CPU
        sample_num_steps=settings["steps"],
        sample_eta=1.0,
        sample_guidance_scale=settings["guidance_scale"],
        sample_batch_size=settings["batch"],
        sample_num_batches_per_epoch=settings["batches"],
        train_batch_size=settings["batch"],
        train_gradient_accumulation_steps=settings["batches"],
        train_learning_rate=1e-3,
        train_cfg=settings["guidance_scale"] > 1,
        per_prompt_stat_tracking=False,
    )
    trainer = DDPOTrainer(config, redness, next_prompt, pipeline)
    pipeline.unet.forward = timed("network", pipeline.unet.forward)
    pipeline.vae.decode = timed("decode", pipeline.vae.decode)
    trainer.accelerator.backward = timed("backward", trainer.accelerator.backward)
    costs, step = [], 0
    for epoch in range(settings["rollouts"] + 1):
        work.clear()
        start = time.perf_counter()
        step = trainer.step(epoch, step)
        costs.append([time.perf_counter() - start, dict(work)])
print(json.dumps(costs[1:]))
