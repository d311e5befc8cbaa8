"""What a run has left, for tests to compare."""

import torch
from safetensors.torch import load_file

from rl.adapter import LORA_WEIGHTS
from rl.run_state import RunState


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


def assert_resumes_to_the_bit(make_trainer, tmp_path, **settings):
    """Four rollouts at once, and two and two, end alike; returns the trainers of the whole and of the rest."""
    whole = make_trainer(output_dir=str(tmp_path / "whole"), num_train_epochs=4, **settings)
    whole.train()
    make_trainer(output_dir=str(tmp_path / "part"), num_train_epochs=2, **settings).train()
    rest = make_trainer(output_dir=str(tmp_path / "part"), num_train_epochs=4, **settings)
    rest.train(resume_from_checkpoint="latest")
    last = f"checkpoint-{whole.state.global_step}"
    assert rest.state.global_step == whole.state.global_step == 4 * whole.plan.updates
    assert_same(lora(tmp_path / "whole" / last), lora(tmp_path / "part" / last))
    states = [RunState.read(tmp_path / run / last) for run in ("whole", "part")]
    assert states[0].facts == states[1].facts
    assert states[0].tensors.keys() == states[1].tensors.keys()
    for name, tensor in states[0].tensors.items():
        assert torch.equal(tensor, states[1].tensors[name]), name
    return whole, rest
