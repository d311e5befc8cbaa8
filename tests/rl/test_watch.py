import io
import json
import math
import os
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from finetune.run import watch_facts
from finetune.run_arguments import RewardedRunArguments
from reward.arguments import parse_arguments
from reward.feedback import Reward
from reward.others import PickScore
from rl.ddpo_config import DDPOConfig
from rl.evaluate import HeldOut
from rl.monitors import (
    agreement,
    dead_groups,
    diversity,
    edge_energy,
    file_size,
    map_entropy,
    paired_fall,
    saturation,
    standard_error,
)
from rl.run_state import RunState
from rl.scoring import RewardError, features
from rl.sde import kl_map, step_mean
from rl.watch import ERRORS, WINDOW, Watch
from rl.watch_limits import MONITORS, check_watch
from tests.rl.conftest import PROMPTS
from tests.rl.toy_rewards import Plain
from tests.test_house import ROOT

# ---- Measures ----


def test_file_size_is_the_jpegs_without_what_an_empty_one_has():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (32, 48, 3), generator=generator, dtype=torch.uint8)
    sizes = []
    for array in (noise, torch.full_like(noise, 128)):
        buffer = io.BytesIO()
        Image.fromarray(array.numpy()).save(buffer, format="JPEG", quality=95)
        sizes.append(len(buffer.getvalue()))
    pictures = torch.stack([noise.permute(2, 0, 1) / 255, torch.full((3, 32, 48), 0.5), torch.zeros(3, 32, 48)])
    found = file_size(pictures).tolist()
    assert found[0] == sizes[0] - sizes[1] > 1000
    assert max(found[1:]) < 10


def test_entropy_is_one_where_a_map_is_even_and_zero_where_it_is_a_point():
    maps = torch.zeros(5, 2, 2)
    maps[1] = 0.3
    maps[2, 0, 1] = 7.0
    maps[3, 0] = 2.0  # two of four places: log 2 / log 4
    maps[4] = torch.tensor([[1.0, 1.0], [2.0, 0.0]])  # entropy of (1/4, 1/4, 1/2), 1.5 bit of 2
    assert map_entropy(maps).tolist() == pytest.approx([1, 1, 0, 0.5, 0.75])
    assert map_entropy(torch.rand(2, 1, 1)).tolist() == [1, 1]


def test_saturation_is_the_share_of_terms_at_an_end_of_their_range():
    terms = {
        "a": torch.tensor([0.995, 0.5, 0.0]),
        "b": torch.tensor([9.75, 9.85, -10.0]),
        "unranged": torch.tensor([1.0, 1.0, 1.0]),
    }
    ranges = {"a": (0.0, 1.0), "b": (-10.0, 10.0), "absent": (0.0, 1.0)}
    assert saturation(terms, ranges).tolist() == [0.5, 0.5, 1.0]  # 1% of the length of 20 is 0.2


def test_group_figures_by_hand():
    values = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.02, 3.0, 5.0])
    assert dead_groups(values, 2, std_floor=0.05) == 0.75
    assert dead_groups(values, 2, std_floor=0.005) == 0.5
    # group means 1, 1, 1.01, 4
    assert standard_error(values, 2) == pytest.approx(torch.tensor([1.0, 1.0, 1.01, 4.0]).std().item() / 2)
    assert standard_error(values, 8) == pytest.approx(values.std().item() / 8**0.5)  # one group: its pictures


def test_agreement_is_the_mean_of_scipys_correlations_whatever_the_prompts():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 6, 5, generator=generator)
    each = [stats.pearsonr(*pair).statistic for pair in zip(first, second, strict=True)]
    wanted = np.mean(each)
    found, error = agreement(first.flatten(), second.flatten(), 5)
    assert found == pytest.approx(wanted)
    assert error == pytest.approx(max(0.5, np.std(each, ddof=1)) / 6**0.5)
    easy = torch.randn(6, 1, generator=generator) * 50  # what a prompt adds to its pictures, and how much it stretches
    assert agreement((first * 3 + easy).flatten(), (second - easy).flatten(), 5)[0] == pytest.approx(wanted, abs=1e-5)


def test_who_sees_no_difference_neither_agrees_nor_disagrees():
    second = torch.tensor([1.0, 2.0, 3.0, 3.0, 2.0, 1.0])
    assert agreement(torch.tensor([0.7, 0.7, 0.7, 0.1, 0.2, 0.3]), second, 3)[0] == pytest.approx(-0.5)
    assert agreement(second, torch.full((6,), 0.1), 3)[0] == 0


@pytest.mark.parametrize("opinion", [0.0, 0.9], ids=["chance", "prompts differ"])
def test_the_error_of_agreement_is_what_chance_and_the_choice_of_prompts_make_of_it(opinion):
    """Of every second prompt the two agree as much as they disagree of the others."""
    generator, found = torch.Generator().manual_seed(1), []
    for _ in range(1000):
        first, own = torch.randn(2, 32, 4, generator=generator)
        sign = torch.randint(0, 2, (32, 1), generator=generator) * 2 - 1
        second = opinion * sign * first + (1 - opinion**2) ** 0.5 * own
        found.append(agreement(first.flatten(), second.flatten(), 4))
    values, errors = torch.tensor(found).T
    assert values.std().item() == pytest.approx(errors.mean().item(), rel=0.06)
    assert (errors.mean() > 1.3 * 96**-0.5) == (opinion > 0)


def test_a_paired_fall_is_as_seldom_as_scipys_t():
    before, after = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)).tolist()
    for old, new in ((before, after), (after, before)):
        test = stats.ttest_rel(new, old, alternative="less")
        assert paired_fall(old, new) == pytest.approx(stats.norm.ppf(test.pvalue))
    assert paired_fall(before, before) == 0
    assert paired_fall([1.0, 1.0], [0.0, 0.0]) < -6  # all alike: as sure as two can be
    assert paired_fall([0.0] * 99, [1.0] * 99) > 30
    assert paired_fall(before, after[1:]) is paired_fall([0.0], [1.0]) is None


@pytest.mark.parametrize("prompts", [2, 4, 96])
def test_of_evaluations_in_which_nothing_happens_few_fall(prompts):
    """One in 740, with 20,000 of them; also of two prompts."""
    differences = np.random.default_rng(0).normal(size=(20000, prompts))
    falls = sum(paired_fall([0.0] * prompts, row) < MONITORS["evaluated"].limit for row in differences)
    assert 15 <= falls <= 42


def test_diversity_of_features():
    seen = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 1.0], [1.0, 1.0]])
    assert diversity(seen, 2).tolist() == pytest.approx([5 / 2**0.5, 0])


def test_features_are_the_rewards_own_or_none():
    class Sees(Plain):
        def features(self, images):
            return images.mean((2, 3))

    images = torch.rand(5, 3, 4, 4)
    assert features(Plain(), images) is None
    assert torch.equal(features(Sees(), images, batch_size=2), images.mean((2, 3)))
    for wrong in (lambda images: images, lambda images: images.mean((2, 3)) * float("nan")):
        reward = Plain()
        reward.features = wrong
        with pytest.raises(RewardError, match=r"features are to be finite, \(5, D\)"):
            features(reward, images)


# ---- Limits ----


def test_a_crossing_is_said_once_and_again_after_a_recovery(caplog):
    watch, over = Watch({}), []
    for value in (10.0, 7.0, 5.0, 4.0, 9.0, 5.0):
        assert watch.observe({"drawn": value}) == {"drawn": value / 10}
        over.append(list(watch.over))
    assert over == [[], [], ["drawn"], ["drawn"], [], ["drawn"]]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert "hold 50% of the edges they had at the start: the policy may be learning to draw less" in lines[0]
    assert "watch/drawn is 0.5, its limit 0.6" in lines[0]


@pytest.mark.parametrize(
    ("name", "values", "over"),
    [
        ("drawn", (1, 1.66, 1.67), [False, False, True]),
        ("file_size", (100, 61, 59), [False, False, True]),
        ("diversity", (0.1, 0.071, 0.069, 0.5), [False, False, True, False]),
        ("map_entropy", (0.8, 0.57, 0.55, 1.0), [False, False, True, False]),
        ("kl", (0, 0.019, 0.021), [False, False, True]),
        ("saturation", (0.5, 0.51), [False, True]),
        ("dead_groups", (0.0, 0.5, 0.6), [False, False, True]),
        ("file_size", (0.0, 50.0), [False, False]),  # nothing was there to be lost
    ],
)
def test_default_limits(name, values, over):
    watch, found = Watch({}, speaks=False), []
    for value in values:
        watch.observe({name: value})
        found.append(watch.over == [name])
    assert found == over


def rollout(reward, held_out, error=0.05, spread=1.0):
    return {"reward": reward, "reward_error": 1e9, "reward_spread": 1.0, "held_out": held_out, "held_out_error": error,
            "held_out_spread": spread}  # fmt: skip


def test_held_out_counts_what_is_beyond_three_standard_errors():
    watch = Watch({}, speaks=False)
    watch.observe(rollout(0, 10, error=0.3, spread=2.0))
    curve = watch.observe(rollout(2, 6, error=0.4, spread=5.0))["held_out"]  # the spread is that of the start
    assert curve == pytest.approx((8 - 10) / 2)
    error = math.sqrt((0.3**2 + 0.4**2) / 2**2 + 0.3**2) / 2
    assert curve + 3 * error < -0.2
    assert watch.over == ["held_out"]
    for _ in range(WINDOW):
        curve = watch.observe(rollout(2, 8.72, error=0.0))["held_out"]
    assert curve == pytest.approx(-0.64)  # the first rollouts have left the window
    assert curve + 3 * 0.3 / 2 == pytest.approx(-0.19)
    assert not watch.over


def test_noise_of_small_rollouts_does_not_trip_the_held_out_reward():
    """100 runs of 30 rollouts of 8 prompts, in which the trained reward rises and the held-out one stays."""
    generator, tripped = torch.Generator().manual_seed(0), 0
    for _ in range(100):
        watch, over = Watch({}, speaks=False), False
        for number in range(30):
            means = torch.randn(8, generator=generator)
            watch.observe(rollout(number, float(means.mean()), error=float(means.std() / 8**0.5), spread=1.4))
            over |= bool(watch.over)
        tripped += over
    assert tripped <= 3


def test_a_fall_is_found_within_the_window():
    watch = Watch({}, speaks=False)
    for number in range(WINDOW):
        watch.observe(rollout(number, 0.0))
    for number in range(WINDOW):
        watch.observe(rollout(WINDOW + number, -0.6))
    assert watch.over == ["held_out"]


def test_a_fall_with_the_trained_reward_is_no_gaming():
    watch = Watch({}, speaks=False)
    for number in range(10):
        watch.observe(rollout(-number, -number))
    assert not watch.over


def ours(reward, error=0.1, spread=2.0, **more):
    """Of a run without a held-out reward."""
    return {"reward": reward, "reward_error": error, "reward_spread": spread, **more}


def test_a_trained_reward_that_falls_beyond_its_noise_is_said():
    watch = Watch({}, speaks=False)
    watch.observe(ours(1.0, error=0.0))
    assert watch.observe(ours(-0.2, error=0.2))["reward"] == pytest.approx(-0.3)
    assert not watch.over  # three errors of 0.2 / 2 / 2 are half of it
    assert watch.observe(ours(-0.2, error=0.2))["reward"] == pytest.approx(-0.4)
    assert watch.over == ["reward"]  # -0.4 + 3 * (2 * 0.2^2)^0.5 / 3 / 2 < -0.2


def test_agreement_counts_by_the_worst_window_beyond_its_error():
    """Four rollouts of agreement, then of -0.5: the last one alone says enough."""
    watch, error = Watch({}, speaks=False), 0.16
    for _ in range(4):
        watch.observe(ours(0.0, agreement=0.6, agreement_error=error))
    curve = watch.observe(ours(0.0, agreement=-0.5, agreement_error=error))["agreement"]
    assert curve == pytest.approx((4 * 0.6 - 0.5) / WINDOW)
    assert -0.5 + ERRORS * error < 0 < curve
    assert watch.over == ["agreement"]
    slow = Watch({}, speaks=False)
    for count in range(1, WINDOW + 1):  # each too little by itself
        slow.observe(ours(0.0, agreement=-0.3, agreement_error=error))
        assert (slow.over == ["agreement"]) == (-0.3 + ERRORS * error / count**0.5 < 0)
    assert slow.over


def test_rewards_that_have_nothing_to_do_with_each_other_seldom_disagree():
    """100 runs of 30 rollouts of 8 prompts with 4 pictures."""
    generator, tripped = torch.Generator().manual_seed(0), 0
    for _ in range(100):
        watch, over = Watch({}, speaks=False), False
        for _ in range(30):
            value, error = agreement(*torch.randn(2, 32, generator=generator), 4)
            watch.observe(ours(0.0, agreement=value, agreement_error=error))
            over |= bool(watch.over)
        tripped += over
    assert tripped <= 10


def test_evaluations_are_compared_in_pairs_with_the_first():
    watch = Watch({}, speaks=False)
    start = {"reward": [0.1, 0.9, 0.5, 0.4], "held_out": [1.0, 2.0, 3.0, 4.0]}
    assert watch.observe_evaluation(start) == {"evaluated": 0.0}
    fallen = [one - change for one, change in zip(start["held_out"], (0.10, 0.11, 0.09, 0.10), strict=True)]
    rest = Watch({}, speaks=False)
    rest.load_state(json.loads(json.dumps(watch.state())))
    for one in (watch, rest):
        found = one.observe_evaluation(start | {"held_out": fallen})["evaluated"]
        assert found == paired_fall(start["held_out"], fallen)
        assert one.over == ["evaluated"]
        one.observe_evaluation(start)
        assert (one.over, one.crossed) == ([], ["evaluated"])
    assert Watch({}).observe_evaluation({"reward": [0.5]}) == {}  # one prompt tells nothing


def test_evaluations_are_compared_with_the_best_one_too():
    """What rises and falls again is seen before it is below the start, a little later for the choice among many."""
    watch = Watch({}, speaks=False)
    noise = np.random.default_rng(0).normal(size=(5, 50))
    levels = (0.0, 1.0, 2.0, 1.9, 1.0)
    seen = [(level + 0.5 * row).tolist() for level, row in zip(levels, noise, strict=True)]
    found = [watch.observe_evaluation({"reward": values})["evaluated"] for values in seen]
    assert min(found[:3]) == 0
    assert found[4] == paired_fall(seen[2], seen[4], choices=4) > paired_fall(seen[2], seen[4])
    assert watch.over == ["evaluated"]
    assert paired_fall(seen[2], seen[3], choices=10**6) == 0


def test_this_process_own_evaluation_before_training_comes_before_a_checkpoints():
    """It is of the same prompts, also where the run goes on with others, or with a held-out reward that is new."""
    part, rest = Watch({}, speaks=False), Watch({}, speaks=False)
    part.observe_evaluation({"reward": [0.1, 0.2, 0.3]})
    rest.observe_evaluation({"reward": [0.8, 0.9, 0.7], "held_out": [1.0, 2.0, 3.0]})
    rest.load_state(part.state())
    fallen = {"reward": [0.8, 0.9, 0.7], "held_out": [0.5, 1.51, 2.49]}
    assert rest.observe_evaluation(fallen)["evaluated"] == paired_fall([1.0, 2.0, 3.0], fallen["held_out"])


def test_a_run_goes_on_with_a_held_out_reward_that_it_had_not():
    part, rest = Watch({}, speaks=False), Watch({}, speaks=False)
    part.observe(ours(0.0))
    rest.load_state(part.state())
    assert rest.observe(ours(0.0) | rollout(0.0, 5.0) | {"agreement": 0.5, "agreement_error": 0.1})["agreement"] == 0.5
    assert rest.observe(rollout(1.0, 4.0, error=0.0) | ours(1.0))["held_out"] == pytest.approx(-0.5)


def test_what_was_known_does_not_change_with_what_is_learned():
    """A rollout that is cut short is gone through again from what was known before it."""
    watch = Watch({}, ["drawn"], speaks=False)
    watch.observe(ours(0.0, drawn=1.0))
    watch.observe_evaluation({"reward": [0.0, 1.0]})
    known = watch.state()
    told = json.dumps(known)
    watch.observe(ours(0.0, drawn=0.1))
    watch.observe_evaluation({"reward": [0.0, 0.5]})
    assert json.dumps(known) == told


def test_limits_may_be_moved_or_taken_away_and_curves_stay():
    watch = Watch({"drawn": 0.9, "kl": None}, speaks=False)
    watch.observe({"drawn": 1.0})
    assert watch.observe({"drawn": 0.85, "kl": 99.0}) == {"drawn": 0.85, "kl": 99.0}
    assert watch.over == ["drawn"]


def test_only_what_is_named_stops():
    for stop_on, stopping in (([], []), (["kl"], ["kl"]), (["all"], ["drawn", "kl"])):
        watch = Watch({}, stop_on, speaks=False)
        watch.observe({"drawn": 1.0})
        watch.observe({"drawn": 0.1, "kl": 1.0})
        assert watch.stopping == stopping


def test_who_does_not_speak_says_nothing(caplog):
    Watch({}, speaks=False).observe({"kl": 1.0})
    assert not caplog.text


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_resumed_watch_is_the_uninterrupted_one_to_the_bit(cut, caplog):
    generator = torch.Generator().manual_seed(1)
    shown = [
        {
            name: float(torch.rand(1, generator=generator) + 0.1)
            for name in (*MONITORS, *rollout(0, 0), "agreement_error")
        }
        for _ in range(8)
    ]
    whole, part, rest = Watch({}), Watch({}, speaks=False), Watch({})
    curves = [whole.observe(measured) for measured in shown]
    said = [record.getMessage() for record in caplog.records]
    caplog.clear()
    for measured in shown[:cut]:
        part.observe(measured)
    part.note_checkpoint(cut, 0.1)
    rest.load_state(json.loads(json.dumps(part.state())))
    assert [rest.observe(measured) for measured in shown[cut:]] == curves[cut:]
    assert (rest.over, rest.best) == (whole.over, {"global_step": cut, "held_out": 0.1})
    again = [record.getMessage() for record in caplog.records]
    assert again == said[len(said) - len(again) :]


def test_the_best_checkpoint_is_the_first_of_the_best():
    watch = Watch({})
    for step, value in ((1, 0.5), (2, 0.7), (3, 0.7), (4, 0.6)):
        watch.note_checkpoint(step, value)
    assert watch.best == {"global_step": 2, "held_out": 0.7}


def test_an_evaluation_chooses_among_checkpoints_and_a_rollout_only_without_one():
    """Rollouts from 1 .. 4 find more and more; evaluations, made of 2 and 4, find 4 worse."""
    watch, best = Watch({}, speaks=False), []
    for step, drawn, evaluated in ((1, 0.1, None), (2, 0.2, 0.6), (3, 0.3, None), (4, 0.4, 0.5)):
        if evaluated is not None:
            watch.observe_evaluation({"reward": [0.0, 0.0], "held_out": [evaluated - 0.1, evaluated + 0.1]}, step)
        rest = Watch({}, speaks=False)
        rest.load_state(json.loads(json.dumps(watch.state())))
        watch = rest
        watch.note_checkpoint(step, drawn)
        best.append(watch.best)
    assert (
        best
        == [{"global_step": 1, "held_out": 0.1}]
        + [{"global_step": 2, "held_out": pytest.approx(0.6), "evaluated": True}] * 3
    )


@pytest.mark.parametrize(
    ("limits", "stop_on", "message"),
    [
        ({"drawm": 0.5}, [], "watch_limits: there is no monitor 'drawm' .nearest name: 'drawn'.; there are held_out, "),
        ({}, ["diversty"], "stop_on: there is no monitor 'diversty' .nearest name: 'diversity'"),
        ({"kl": None}, ["kl"], "stop_on names 'kl', whose limit watch_limits takes away"),
        ({"kl": "far"}, [], "limit of kl is 'far'; give a number between 0 and inf"),
        ({"kl": float("nan")}, [], "limit of kl is nan"),
        ({"kl": True}, [], "limit of kl is True"),
        ({"held_out": 0.2}, [], "limit of held_out is 0.2; give a number between -inf and 0"),
        ({"drawn": 1.5}, [], "limit of drawn is 1.5; give a number between 0 and 1"),
    ],
)
def test_settings_that_are_none(make_args, limits, stop_on, message):
    with pytest.raises(ValueError, match=message):
        make_args(watch_limits=limits, stop_on=stop_on)


def test_settings_that_are_fine():
    check_watch({"kl": None, "drawn": 0.9}, ["all"])
    check_watch({name: monitor.limit for name, monitor in MONITORS.items()}, list(MONITORS))


# ---- Runs ----


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def edges(images, prompts):
    return Reward(edge_energy(images))


def no_edges(images, prompts):
    """Easy to game: what is not drawn has none."""
    return Reward(-edge_energy(images))


def red(images, prompts):
    return Reward(images[:, 0].mean((1, 2)))


def red_below(images, prompts):
    return Reward(images[:, 0, 8:].mean((1, 2)))


@pytest.mark.parametrize(("trained", "held_out", "gamed"), [(no_edges, edges, True), (red, red_below, False)])
def test_a_reward_that_is_gamed_trips_its_monitors_and_a_sound_one_none(make_trainer, trained, held_out, gamed, caplog):
    """An untrained network moves far at once, and cannot empty its pictures: hence other limits than the defaults."""
    trainer = make_trainer(
        trained, held_out=held_out, watch_limits={"kl": None, "drawn": 0.975},
        num_train_epochs=7, generation_batch_size=64, num_generations=32, per_device_train_batch_size=64,
        gradient_accumulation_steps=1, learning_rate=0.1 if gamed else 0.02, warmup_steps=0, lora_rank=4,
        train_steps=["1"], save_strategy="no",
    )  # fmt: skip
    trainer.train()
    assert logged(trainer, "reward")[-1] > logged(trainer, "reward")[0]
    said = [record.getMessage() for record in caplog.records if record.name == "rl.watch"]
    assert any("the held-out reward falls" in line for line in said) == gamed
    assert any("learning to draw less" in line for line in said) == gamed
    assert bool(said) == gamed
    shown = {name.removeprefix("watch/") for name in trainer.state.log_history[-2] if name.startswith("watch/")}
    told_by_none = {"saturation", "map_entropy"}  # these rewards have neither ranges nor maps
    assert shown == set(MONITORS) - told_by_none - {"evaluated"}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("ddpo_*.yaml")), ids=lambda path: path.name)
def test_presets_watch_a_reward_that_training_does_not_see(path, monkeypatch):
    """But for the small world's, whose other reward is the judge. The weights may be nowhere here."""
    monkeypatch.setattr("reward.others.clip.check_folder", lambda *_, **__: None)
    flags = ["--config", str(path), "--use_cpu", "--bf16", "false"]
    run, args = parse_arguments([RewardedRunArguments, DDPOConfig], flags)
    assert "held_out" not in args.stop_on
    if "tinyworld" in path.name:
        assert not run.watch_reward
        assert "# No watch_reward: the only other reward here is the judge" in path.read_text()
        return
    assert isinstance(run.make_eval_rewards()[run.watch_reward], PickScore)
    left_out, _ = parse_arguments(
        [RewardedRunArguments, DDPOConfig], [*flags, "--eval_rewards", "{}", "--watch_reward", ""]
    )
    assert not left_out.watch_reward
    assert not left_out.make_eval_rewards()


def fading(trainer, contrasts):
    """Let the policy draw with these contrasts, one a rollout (of one update)."""
    decode = trainer.policy.decode

    def faded(latents):
        return 0.5 + contrasts[min(trainer.state.global_step, len(contrasts) - 1)] * (decode(latents) - 0.5)

    trainer.policy.decode = faded
    return trainer


def test_an_evaluation_that_finds_less_than_before_training_ends_the_run(make_trainer, caplog):
    """The second is of pictures that have faded; what is trained on is the contrast, as is what is held out."""
    rewards = {"reward": edges, "other": no_edges}
    trainer = make_trainer(
        edges, held_out=no_edges, eval_on=HeldOut(["a red star", "a blue circle", "a green square"], rewards),
        eval_strategy="epoch", stop_on=["evaluated"], watch_limits={"reward": None}, num_train_epochs=9,
        save_strategy="no", learning_rate=1e-9,
    )  # fmt: skip
    fading(trainer, [1.0, 1.0, 0.5]).train()
    assert trainer.state.global_step == 2
    assert trainer.watch.stopping == ["evaluated"]
    values = logged(trainer, "watch/evaluated")
    assert values[0] == 0
    assert values[1] < -3
    assert "the trained or the held-out reward lower than it was" in caplog.text


def test_what_the_command_finds_before_training_is_what_evaluations_are_held_against(make_trainer):
    trainer = make_trainer(edges, eval_on=HeldOut(PROMPTS, {"reward": edges}))
    fading(trainer, [1.0, 0.5])
    figures, _ = trainer.judge(trainer.eval_on)
    assert trainer.watch_evaluation(figures, trainer.eval_on.rewards) == {"evaluated": 0.0}
    trainer.state.global_step = 1
    figures, _ = trainer.judge(trainer.eval_on)
    assert trainer.watch_evaluation(figures, trainer.eval_on.rewards)["evaluated"] < -3


def test_stop_on_ends_the_run_and_keeps_the_best_checkpoint(make_trainer, caplog):
    """The rollout from checkpoint 1 holds most; that from checkpoint 4 too little, so that update 5 is the last."""
    trainer = make_trainer(
        held_out=edges, stop_on=["drawn"], watch_limits={"kl": None}, num_train_epochs=9, save_total_limit=1
    )
    fading(trainer, [0.8, 1.0, 0.9, 0.7, 0.4]).train()
    assert trainer.state.global_step == 5
    assert trainer.watch.stopping == ["drawn"]
    assert "stopping after 5 of 9 updates: watch/drawn across its limit" in caplog.text
    kept = sorted(name for name in os.listdir(trainer.args.output_dir) if name != "runs")
    assert kept == ["checkpoint-1", "checkpoint-5"]
    assert trainer.best_checkpoint.name == "checkpoint-1"
    assert trainer.left == trainer.best_checkpoint
    assert (trainer.best_checkpoint / "complete.json").exists()


def test_a_run_that_only_warns_goes_on(make_trainer, caplog):
    trainer = fading(make_trainer(num_train_epochs=3), [1.0, 0.4])
    trainer.train()
    assert trainer.state.global_step == 3
    assert sum("learning to draw less" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("changes", [{}, {"ema_decay": 0.5}, {"tune": "full"}], ids=["LoRA", "average", "U-Net"])
def test_without_a_held_out_reward_the_last_sound_checkpoint_is_what_a_stop_leaves(make_trainer, tmp_path, changes):
    """Rollouts 0 .. 2 are sound, so checkpoint 2 is; 3 is not. Killed at its end, it ends alike."""

    def make():
        trainer = make_trainer(
            stop_on=["drawn"], watch_limits=dict.fromkeys(set(MONITORS) - {"drawn"}), num_train_epochs=9,
            save_total_limit=1, save_strategy="steps", save_steps=1, learning_rate=0.02, **changes,
        )  # fmt: skip
        return fading(trainer, [1.0, 0.9, 0.8, 0.5, 0.4])

    trainer = make()
    trainer.train()
    assert trainer.state.global_step == 4
    assert sorted(name for name in os.listdir(tmp_path / "run") if "check" in name) == ["checkpoint-2", "checkpoint-4"]
    assert trainer.best_checkpoint == trainer.left == tmp_path / "run/checkpoint-2"
    assert watch_facts(trainer) == {
        "over": ["drawn"], "stopped_by": ["drawn"], "left": str(trainer.left),
        "best_checkpoint": {"path": str(trainer.left), "global_step": 2},
    }  # fmt: skip
    left = [weight.clone() for weight in trainer.trained_weights()]
    wanted = make()
    wanted.policy.load_adapter(tmp_path / "run/checkpoint-2")
    if wanted.average is not None:
        wanted._load_average(RunState.read(tmp_path / "run/checkpoint-2"))
        wanted.average.copy_to(wanted.trained_weights())
    assert all(map(torch.equal, left, wanted.trained_weights()))

    again = make()
    again.train(resume_from_checkpoint="latest")
    assert again.state.global_step == 4
    assert again.experience is None
    assert again.watch.state() == trainer.watch.state()
    assert all(map(torch.equal, left, again.trained_weights()))


def test_a_stop_without_a_sound_checkpoint_leaves_the_last_update(make_trainer, caplog):
    trainer = make_trainer(stop_on=["drawn"], num_train_epochs=4, save_strategy="no")
    fading(trainer, [1.0, 0.4]).train()
    assert trainer.state.global_step == 2
    assert trainer.left is trainer.best_checkpoint is None
    assert (
        "watch/drawn across its limit, and no checkpoint from before: the LoRA left is that of the last update"
        in caplog.text
    )


def test_a_run_that_went_on_with_other_limits_is_judged_by_them():
    part, rest = Watch({"kl": 0.1}, ["kl"], speaks=False), Watch({"kl": 0.3}, ["kl"], speaks=False)
    part.observe({"drawn": 1.0, "kl": 0.2})
    assert part.stopping == ["kl"]
    rest.load_state(part.state())
    assert not rest.stopping


def test_only_what_may_end_the_run_unmakes_a_sound_checkpoint():
    for stop_on, best in (([], {"global_step": 1}), (["drawn"], {"global_step": 2}), (["kl"], {"global_step": 1})):
        watch = Watch({}, stop_on, speaks=False)
        for step, kl in ((1, 0.0), (2, 1.0)):
            watch.observe({"drawn": 1.0, "kl": kl})
            watch.note_checkpoint(step)
        assert watch.best == best


def test_a_resumed_run_watches_as_the_uninterrupted_one_to_the_bit(make_trainer, tmp_path):
    def run(folder, rollouts, **resume):
        contrasts = [0.8, 1.0, 0.4, 0.9]
        trainer = make_trainer(
            edges,
            held_out=red,
            eval_on=HeldOut(PROMPTS, {"reward": edges, "other": red}),
            eval_strategy="epoch",
            output_dir=str(tmp_path / folder),
            num_train_epochs=rollouts,
            save_total_limit=1,
        )
        fading(trainer, contrasts).train(**resume)
        return trainer

    whole = run("whole", 4)
    run("part", 2)
    rest = run("part", 4, resume_from_checkpoint="latest")
    for name in set(MONITORS) - {"saturation", "map_entropy"}:
        assert logged(whole, f"watch/{name}") == logged(rest, f"watch/{name}"), name
        assert len(set(logged(whole, f"watch/{name}"))) > 1 or name == "dead_groups", name
        assert len(logged(whole, f"watch/{name}")) == 4, name
    assert whole.watch.state() == rest.watch.state()
    assert whole.watch.best is not None
    assert os.listdir(tmp_path / "whole") == os.listdir(tmp_path / "part")


def test_going_on_from_another_folder_has_no_best_checkpoint_yet(make_trainer, tmp_path):
    fading(make_trainer(held_out=edges, num_train_epochs=3, save_total_limit=None), [0.8, 1.0, 0.9]).train()
    assert json.loads((tmp_path / "run/checkpoint-3/run_state.json").read_text())["watch"]["best"]["global_step"] == 1
    other = make_trainer(held_out=edges, num_train_epochs=4, output_dir=str(tmp_path / "other"))
    other.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-3"))
    assert other.best_checkpoint is None


def move_away(policy):
    """As if it had been trained: a LoRA starts as nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in policy.network.named_parameters():
            if "lora_B" in name:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))


@pytest.mark.parametrize("accumulate", [8, 2])
def test_kl_is_the_mean_over_all_trained_steps(make_trainer, accumulate):
    """By hand, of a rollout's first micro-batch of pictures; with 2 micro-batches an update, nothing is learnt here."""
    trainer = make_trainer(
        num_inference_steps=5, train_steps=["all"], num_train_epochs=1, save_strategy="no",
        gradient_accumulation_steps=accumulate, learning_rate=0.02 if accumulate == 8 else 1e-12,
    )  # fmt: skip
    policy, schedule = trainer.policy, trainer.schedule
    move_away(policy)
    experience = trainer.collect(0)
    conditioning, kls = policy.encode(experience.prompts[:4]), []
    for k, step in enumerate(experience.trajectory.steps.tolist()):
        latents, index = experience.trajectory.latents[k, :4], torch.full((4,), step)
        means = []
        for place in (nullcontext(), policy.reference()):
            with torch.no_grad(), place:
                output = policy.predict(policy.network, latents, schedule.timesteps[index], conditioning)
                mean, std = step_mean(output, latents, index, schedule)
                means.append(mean)
        kls.append(float(kl_map(*means, std).mean()))
    assert len(kls) == 4
    assert max(kls) > 5 * kls[0] > 0
    trainer.train()
    assert logged(trainer, "watch/kl") == pytest.approx([sum(kls) / 4], rel=1e-4)


def test_kl_is_measured_without_touching_the_training(make_trainer, monkeypatch):
    watched = make_trainer(save_strategy="no")
    watched.train()
    monkeypatch.setattr("rl.lora.Lora.has_reference", False)
    plain = make_trainer(save_strategy="no")
    plain.train()
    assert len(logged(watched, "watch/kl")) == 2
    assert not logged(plain, "watch/kl")
    assert logged(watched, "loss") == logged(plain, "loss")
    assert all(map(torch.equal, watched.trained_weights(), plain.trained_weights()))


ONE = {"num_generations": 1, "advantage_baseline": "batch"}


@pytest.mark.parametrize(
    ("name", "settings", "why"),
    [
        ("diversity", ONE, "num_generations is 1"),
        ("dead_groups", ONE, "num_generations is 1"),
        ("agreement", ONE, "num_generations is 1"),
        ("kl", {"tune": "full"}, "tune is full and keeps no copy of the base"),
        ("evaluated", {}, "eval_strategy is no"),
    ],
)
def test_what_settings_never_measure_cannot_end_a_run(make_args, name, settings, why):
    assert make_args(stop_on=["all"], **settings).never_measured[name].startswith(why)
    with pytest.raises(ValueError, match=f"stop_on names {name}, which this run never measures: {why}"):
        make_args(stop_on=["drawn", name], **settings)
    evaluated = {"eval_strategy": "epoch"}
    assert not make_args(stop_on=[name], **evaluated).never_measured
    assert not make_args(stop_on=["kl"], tune="full", beta=0.1, **evaluated).never_measured


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("held_out", "there is no held-out reward"),
        ("agreement", "there is no held-out reward"),
        ("saturation", "the reward does not tell the `ranges`"),
    ],
)
def test_what_rewards_never_tell_cannot_end_a_run(make_trainer, name, why):
    with pytest.raises(ValueError, match=f"stop_on names {name}, which this run never measures: {why}"):
        make_trainer(red, stop_on=[name])
    assert why in make_trainer(red, stop_on=["all"]).watch.off[name]


class Ranged:
    """Tells the range of a term that it does not have."""

    def __init__(self):
        self.ranges = {"absent": (0.0, 1.0)}

    def __call__(self, images, prompts):
        return Reward(images[:, 0].mean((1, 2)), terms={"red": images[:, 0].mean((1, 2))})


@pytest.mark.parametrize("name", ["saturation", "map_entropy"])
def test_what_the_first_rollout_lacks_is_said_before_an_update(make_trainer, name, caplog):
    trainer = make_trainer(Ranged(), stop_on=[name], save_strategy="no")
    with pytest.raises(ValueError, match=f"stop_on names {name}, which the first rollout does not measure: the reward"):
        trainer.train()
    assert trainer.state.global_step == 0
    make_trainer(Ranged(), stop_on=["all"], num_train_epochs=1, watch_limits={"kl": None}, save_strategy="no").train()
    assert f"stop_on all does not stop on {name}: the reward" in caplog.text
