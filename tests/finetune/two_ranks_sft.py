"""The same small run as the test's, under torchrun: `two_ranks_sft.py PIPELINE PICTURES OUTPUT`."""

import os
import sys

import torch
from rich.console import Console

from finetune import sft_data
from finetune.pool import open_pool
from finetune.sft import encode
from finetune.sft_config import SftConfig
from finetune.sft_data import TrainingPictures, make_buckets
from finetune.sft_trainer import SftTrainer
from rl.policy import StableDiffusionPolicy

pipeline, pictures, output = sys.argv[1:]
sft_data.HANDED_ON = 1  # several times, of which one process has less to hand on
torch.set_num_threads(1)
args = SftConfig(
    output_dir=output, use_cpu=True, max_steps=3, per_device_train_batch_size=2, lora_rank=2, learning_rate=1.0,
    warmup_steps=0, optim="sgd", disable_tqdm=True, report_to=[], seed=3, save_strategy="no", prompt_dropout=0.5,
    dataloader_pin_memory=False,
)  # fmt: skip
policy = StableDiffusionPolicy.load(pipeline, lora_rank=2, seed=3)
pool = open_pool(pictures)
trainer = SftTrainer(policy, TrainingPictures(pool, make_buckets(policy, False), torch.ones(len(pool.entries))), args)
encode(trainer, Console(quiet=True))
trainer.train()
trainer.save_model()
trainer.accelerator.wait_for_everyone()
trainer.accelerator.end_training()
os._exit(0)  # as in two_ranks_draft.py: a rank may abort while its interpreter shuts down
