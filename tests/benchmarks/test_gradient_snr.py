from argparse import Namespace
from itertools import combinations
from pathlib import Path

import gradient_snr
import numpy as np
import pytest
import torch
import yaml
from gradient_snr import (
    OBJECTIVE,
    Gradients,
    gain,
    measured,
    objective_credit,
    rows_of_step,
    signal_to_noise,
    variance_rows,
)
from judge_maps import JudgeMaps
from learned_maps import LearnedMaps
from other_credits import OTHERS
from step_gradients import step_gradients

from rl.advantages import group_advantages
from rl.sde import log_prob_map


def test_the_ratio_is_that_of_the_gradients_drawn():
    """Chunks g = s + noise, |s| = 3, noise of variance 1 in each of 400 directions: 3 / 20, within the interval."""
    rng = np.random.default_rng(0)
    signal = np.zeros(400)
    signal[0] = 3.0
    found = []
    for _ in range(60):
        chunks = signal + rng.normal(size=(16, 400))
        gram = chunks @ chunks.T
        value, low, high = signal_to_noise(gram)
        found.append((value, low <= 0.15 <= high))
    values, covered = zip(*found, strict=True)
    assert np.mean(values) == pytest.approx(0.15, abs=0.01)
    assert np.mean(covered) > 0.85


def test_without_signal_the_ratio_is_about_zero_of_either_sign_and_its_interval_says_so():
    rng = np.random.default_rng(1)
    found = [signal_to_noise(chunks @ chunks.T) for chunks in rng.normal(size=(200, 24, 400))]
    values = np.array([value for value, _, _ in found])
    assert abs(values.mean()) < 0.02
    assert 0.3 < np.mean(values < 0) < 0.7
    assert np.mean([low <= 0 <= high for _, low, high in found]) > 0.9


def test_gain_is_by_hand():
    """g = (3, 4) and f = (1, 0) in both chunks: <g, f> = 3, |g| = 5, and the diagonal plays no part."""
    assert gain(np.array([[99.0, 3.0], [3.0, -99.0]]), np.array([25.0, 25.0])) == pytest.approx(600)


def test_a_kind_of_credit_without_noise_gains_more():
    rng = np.random.default_rng(2)
    signal, noise = np.ones((1, 50)), rng.normal(size=(24, 50))
    objective = signal + noise
    kinds = {"image": signal + 3 * noise, "calm": signal + 0.1 * noise, OBJECTIVE: objective}
    rows = {row.name: row for row in rows_of_step(4, kinds)}
    assert not any(OBJECTIVE in name for name in rows)
    assert rows["step 4, calm: signal to noise"].value > 5 * rows["step 4, image: signal to noise"].value
    assert rows["step 4, calm: gain less image's"].low > 0
    assert "step 4, image: gain less image's" not in rows


def test_gains_are_in_the_rewards_own_units():
    """One Gaussian step x ~ N(m, std^2), reward k <a, x> with |a| = 1: a step of length 1 along -E g adds k |cos|."""
    shape, std, slope = (2, 4, 4), torch.tensor(0.5), 0.2
    generator = torch.Generator().manual_seed(0)
    towards = torch.randn(shape, generator=generator)
    towards = towards / towards.norm()
    chunks = {"image": [], OBJECTIVE: []}
    for _ in range(300):
        latents = std * torch.randn(64, *shape, generator=generator)
        reward = slope * (towards * latents).sum(dim=(1, 2, 3))
        advantages = group_advantages(reward, 8, std_floor=1e-3)[:, None, None].expand(-1, 4, 4)
        for name, credit in (("image", advantages), (OBJECTIVE, objective_credit(reward, 8, latents))):
            mean = torch.zeros(shape, requires_grad=True)
            loss = -(credit * log_prob_map(latents, mean.expand_as(latents), std)).mean()
            chunks[name].append(torch.autograd.grad(loss, mean)[0].flatten().numpy())
    gradients = {name: np.stack(of) for name, of in chunks.items()}
    # The mean of the objective's gradient is the true one, -k a.
    own = gradients[OBJECTIVE].mean(axis=0) @ (-slope * towards.flatten().numpy())
    assert own == pytest.approx(slope**2, rel=0.05)
    (row,) = [row for row in rows_of_step(1, gradients) if row.name.endswith("gain")]
    length = np.sqrt((gradients["image"] ** 2).sum(axis=1).mean())
    true = -(gradients["image"] @ (slope * towards.flatten().numpy())).mean() / length
    assert row.value == pytest.approx(1e3 * true, rel=0.05)


@pytest.fixture
def options(tmp_path, monkeypatch):
    """Eight pictures a chunk, in pairs, of three steps."""
    monkeypatch.setattr(gradient_snr, "PICTURES", 8)
    config = tmp_path / "small.yaml"
    settings = yaml.safe_load(Path("configs/ddpo_tinyworld.yaml").read_text(encoding="utf-8"))
    settings |= {"num_inference_steps": 3, "num_generations": 2, "generation_batch_size": 8, "train_steps": [1]}
    config.write_text(yaml.safe_dump(settings | {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}))
    return Namespace(
        config=config, seed=0, steps=None, credits=["image", "paid"], share_noise=None, maps="predictor",
        work=tmp_path / "work",
    )  # fmt: skip


def test_a_run_that_was_stopped_takes_only_the_chunks_that_are_missing(options, monkeypatch):
    first = Gradients(options, "none")
    first.collect(2)
    whole = first.at(1, 2)
    assert {name: of.shape for name, of in whole.items()} == {name: (2, of.shape[1]) for name, of in whole.items()}
    kept = first.file(0).stat().st_mtime_ns
    first.file(1).unlink()
    again = Gradients(options, "none")
    asked, of_chunk = [], again.of_chunk
    monkeypatch.setattr(again, "of_chunk", lambda chunk: asked.append(chunk) or of_chunk(chunk))
    again.collect(2)
    assert asked == [1]
    assert first.file(0).stat().st_mtime_ns == kept
    for name, of in again.at(1, 2).items():
        assert np.array_equal(of, whole[name])
        assert not np.array_equal(of[0], of[1])
        assert (np.abs(of).max(axis=0) > 0).all()  # what never moves is not kept

    assert Gradients(options, "around").folder != first.folder
    options.maps = "judge"
    judged = Gradients(options, "none")
    assert judged.folder != first.folder
    assert isinstance(judged.reward, JudgeMaps)


def test_where_noise_is_shared_each_step_has_pictures_of_its_own(options, monkeypatch):
    """Those of a group are one until that step's own noise; and what a group has in common may be computed once."""
    gradients, seen = Gradients(options, "around"), []

    def look(policy, trajectory, *args):
        seen.append(trajectory)
        return step_gradients(policy, trajectory, *args)

    monkeypatch.setattr(gradient_snr, "step_gradients", look)
    found = gradients.of_chunk(0)
    assert found.shape[:2] == (3, len(gradients.steps)) == (3, 2)
    assert [trajectory.steps.tolist() for trajectory in seen] == [[0], [1]]
    for trajectory in seen:
        pairs = trajectory.latents[0].unflatten(0, (4, 2))
        assert torch.equal(pairs[:, 0], pairs[:, 1])
        behind = trajectory.next_latents[0].unflatten(0, (4, 2))
        assert not torch.equal(behind[:, 0], behind[:, 1])

    monkeypatch.setattr(gradient_snr.Trunks, "of_groups", lambda *args: None)
    assert torch.allclose(gradients.of_chunk(0), found, atol=1e-5 * float(found.abs().max()))


def test_a_way_to_share_noise_is_worth_what_it_takes_off_the_variance():
    """Half the noise's standard deviation, and the same signal: a quarter of the variance."""
    rng = np.random.default_rng(3)
    signal = np.eye(1, 500)
    none, around = (signal + size * rng.normal(size=(48, 500)) for size in (1.0, 0.5))
    (row,) = variance_rows({"none": {2: none}, "around": {2: around}})
    assert row.name == "step 2, the objective's gradient: variance with share_noise around, of none's"
    assert row.value == pytest.approx(0.25, rel=0.03)
    assert row.low < 0.25 < row.high
    assert variance_rows({"around": {2: around}}) == []


def test_several_ways_to_share_noise_are_measured_from_the_same_prompts(options, monkeypatch):
    options.share_noise, options.credits, options.steps = ["none", "before"], ["image"], [1]
    drawn, draw = [], gradient_snr.draw_prompts
    monkeypatch.setattr(gradient_snr, "draw_prompts", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    rows = {row.name: row for row in measured(options, 3)}
    assert drawn[:3] == drawn[3:]
    assert len({tuple(prompts) for prompts in drawn}) == 3
    assert set(rows) == {
        *(f"share_noise {way}, step 1, image: signal to noise" for way in ("none", "before")),
        *(f"share_noise {way}, step 1, image: gain" for way in ("none", "before")),
        "step 1, the objective's gradient: variance with share_noise before, of none's",
    }


def test_learned_maps_leave_the_objective_alone(options, monkeypatch):
    """So `image` compares the same, while `paid` pays for scores at their places."""
    monkeypatch.setattr(gradient_snr, "LEARNED_FROM", range(10_000, 10_002))
    options.steps = [1]
    plain = Gradients(options, "none").of_chunk(0)
    options.maps = "learned"
    learned = Gradients(options, "none")
    assert isinstance(learned.reward, LearnedMaps)
    found = learned.of_chunk(0)
    image, paid, objective = range(3)
    for kind in (image, objective):
        assert torch.allclose(found[kind], plain[kind], atol=1e-3 * float(plain[kind].abs().max()))
    assert not torch.allclose(found[paid], plain[paid], atol=0.05 * float(plain[paid].abs().max()))


def test_credits_that_nothing_else_offers_have_gradients_of_their_own(options):
    options.credits = ["image", *OTHERS]
    image, *others, _ = Gradients(options, "none").of_chunk(0)
    for one, another in combinations([image, *others], 2):
        assert torch.isfinite(another).all()
        assert not torch.allclose(one, another)
