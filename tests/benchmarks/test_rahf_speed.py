"""The parts' times add up, and are those of the model's own parts."""

import sys
import time

import pytest
import rahf_speed
import torch

from reward.model import RahfModel


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    monkeypatch.setattr(rahf_speed, "SIZES", dict.fromkeys(rahf_speed.SIZES, (vision, 32, text)))


@pytest.fixture
def model():
    return RahfModel(rahf_speed.make_config(next(iter(rahf_speed.SIZES)), "light"))


def slowed(module, seconds, backward):
    """`module`, its forward or its backward delayed by a sleep."""

    class Delay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            time.sleep(seconds)
            return gradient

    forward = module.forward

    def delayed(*args, **kwargs):
        if not backward:
            time.sleep(seconds)
        output = forward(*args, **kwargs)
        if not backward:
            return output
        if isinstance(output, torch.Tensor):
            return Delay.apply(output)
        output.last_hidden_state = Delay.apply(output.last_hidden_state)
        return output

    module.forward = delayed


@pytest.mark.parametrize("heads", rahf_speed.HEADS)
def test_parts_add_up_to_the_whole(heads):
    batches = {"prediction": [1, 2], "training step": [2]}
    found = rahf_speed.measure(next(iter(rahf_speed.SIZES)), heads, batches, repeats=3)
    assert list(found) == [("prediction", 1), ("prediction", 2), ("training step", 2)]
    for (kind, images), timing in found.items():
        parts = rahf_speed.STEP_PARTS if kind == "training step" else rahf_speed.PARTS
        assert timing.images == images
        assert sorted(timing.parts) == sorted(parts)
        assert all(seconds > 0 for seconds in timing.parts.values())
        assert 0.5 < sum(timing.parts.values()) / timing.wall <= 1


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("part", rahf_speed.PARTS)
def test_a_slow_part_is_found(model, part, backward):
    """Half a second more of one part, forward or backward, is charged to that part."""
    module = {
        "vision encoder": model.vision,
        "T5 encoder": model.encoder,
        "heatmap heads": model.heatmap_heads["misalignment"],
        "score heads": model.score_heads["aesthetics"],
        "word head": model.word_head,
    }[part]
    slowed(module, 0.5, backward)
    timing = rahf_speed.time_training_step(model, rahf_speed.make_batch(model.config, 1))
    assert timing.parts[part] >= 0.5
    assert sum(timing.parts.values()) - timing.parts[part] < 0.4


def test_accumulated_micro_batches_are_the_batchs_gradient(model, monkeypatch):
    """The step that is timed is the step that a batch at once would be; nothing is left of it."""
    batch, seen = rahf_speed.make_batch(model.config, 4), []
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: seen.append(model.project.weight.grad.clone()), raising=True
    )
    for micro_batch in (1, 4):
        rahf_speed.time_training_step(model, batch, micro_batch)
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-4, atol=1e-7)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_table_divides_by_the_papers_speed(monkeypatch, capsys):
    parts = dict.fromkeys(rahf_speed.STEP_PARTS, 0.5)
    seconds = {"paper": (8.0, 4.0), "light": (2.0, 0.8), "light, pooled": (4.0, 1.6)}
    timings = {heads: rahf_speed.Timing(8, *both, parts) for heads, both in seconds.items()}
    monkeypatch.setattr(rahf_speed, "measure", lambda size, heads, *_: {("prediction", 8): timings[heads]})
    monkeypatch.setattr(sys, "argv", ["rahf_speed.py", "--batch", "8"])
    rows = rahf_speed.rows_of({heads: rahf_speed.measure("", heads) for heads in rahf_speed.HEADS})
    figures = {row.name: row for row in rows}
    assert figures["prediction of 8, paper: images per second"].value == 1
    assert figures["prediction of 8, light: share of T5 encoder"].value == 0.25
    assert figures["prediction of 8: light / paper"].value == 4
    assert figures["prediction of 8: light / paper, by processor time"].value == pytest.approx(5)
    assert figures["prediction of 8: light, pooled / paper"].holds is False  # 2, and 3 is the goal
    assert figures["prediction of 8: light, pooled / paper, by processor time"].value == pytest.approx(2.5)
    rahf_speed.main()
    assert "light / paper" in capsys.readouterr().out


def test_the_typical_timing_is_the_median():
    timings = [rahf_speed.Timing(1, wall, wall, {}) for wall in (3.0, 1.0, 2.0)]
    assert rahf_speed.typical(timings).wall == 2.0
