"""What a run has left, for tests to compare."""

import torch
from safetensors.torch import load_file

from rl.adapter import LORA_WEIGHTS


def lora(folder):
    return load_file(f"{folder}/{LORA_WEIGHTS}")


def assert_same(left, right, **tolerance):
    """Two mappings of tensors: to the bit, or within a `tolerance` of `torch.testing.assert_close`."""
    assert left.keys() == right.keys() != set()
    for name, tensor in left.items():
        if tolerance:
            torch.testing.assert_close(tensor, right[name], **tolerance)
        else:
            assert torch.equal(tensor, right[name]), name


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def events_of(trainer):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(f"{trainer.args.output_dir}/runs").Reload()


def curves_of(trainer):
    """TensorBoard's own view: tag -> [(step, value)]; without times."""
    events = events_of(trainer)
    tags = [tag for tag in events.Tags()["scalars"] if "seconds/" not in tag]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
