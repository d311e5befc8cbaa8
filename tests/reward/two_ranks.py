"""`python -m reward.train` under torchrun, once for each list of arguments in a JSON file: `two_ranks.py FILE`.

Importing takes longer than such a training, so one launch does them all. In which precision the model was given what is
noted in each output folder, in `given.json`.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

sys.path.insert(0, str(Path(__file__).parents[2]))

from reward import train
from reward.trainer import RahfTrainer

torch.set_num_threads(1)
compute_loss = RahfTrainer.compute_loss


def noting(trainer, model, inputs, **how):
    given = {name: str(value.dtype) for name, value in inputs.items()}
    Path(trainer.args.output_dir, "given.json").write_text(json.dumps(given))
    return compute_loss(trainer, model, inputs, **how)


RahfTrainer.compute_loss = noting
for arguments in json.loads(Path(sys.argv[1]).read_text()):
    train.main(arguments)
    torch.distributed.barrier()
    AcceleratorState._reset_state(reset_partial_state=True)
# About one run in ten, a rank aborts while its interpreter shuts down, after all is written, and torchrun reports a
# failure. What is tested is written by now: leave without that teardown.
os._exit(0)
