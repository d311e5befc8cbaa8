"""Every setting of the algorithm does what it says where the trainer reads it: small batches, against sums by hand."""

from contextlib import nullcontext

import pytest
import torch

from finetune.run import try_rewards
from reward.feedback import Reward
from rl.advantages import PromptStatistics
from rl.evaluate import TRAINING_REWARD, HeldOut
from rl.experience import ScoredBatch, gather_experience
from rl.rollout import Trajectory
from rl.sde import step_mean
from tests.rl.conftest import PROMPTS
from tests.rl.toy_rewards import Plain

# ---- The loss ----

HALVES = torch.tensor([1.5] * 4 + [0.5] * 4).expand(4, 8, 8)  # weights of mean 1: the left half counts thrice as much
ADVANTAGES = torch.tensor([1.0, 1.0, -1.0, -2.0])
RATIOS = torch.tensor([1.8, 1.3, 0.5, 0.9])


def surrogates(low, high):
    """min(ratio * A, clip(ratio, low, high) * A) of the rows above, of which the third and fourth have A < 0."""
    return [min(1.8, high), min(1.3, high), -max(0.5, low), -2 * max(0.9, low)]


@pytest.mark.parametrize(
    ("settings", "low", "high"),
    [
        ({"epsilon": 0.2, "epsilon_location": 0.05}, 0.8, 1.2),
        ({"epsilon": 0.2, "epsilon_location": 0.05, "epsilon_high": 0.6}, 0.8, 1.6),
        ({"importance_sampling_level": "location", "epsilon": 0.02, "epsilon_location": 0.4}, 0.6, 1.4),
        (
            {"importance_sampling_level": "location", "epsilon": 0.02, "epsilon_location": 0.4, "epsilon_high": 0.2},
            0.6,
            1.2,
        ),
    ],
    ids=["image", "image, high", "location", "location, high"],
)
def test_the_clip_range_is_that_of_the_level(make_trainer, settings, low, high):
    """The policy has not changed, so the ratios are those by which the old log-probs were moved."""
    trainer = make_trainer(**settings)
    batch = next(trainer.rollout(0))
    by_place = "importance_sampling_level" in settings
    shift = torch.zeros(4, 8, 8)
    shift[:, :, :4] = RATIOS.log()[:, None, None] * (1 if by_place else 4 / 3)  # 4 / 3 * 1.5 / 2 = 1
    batch |= {"old_log_probs": batch["old_log_probs"] - shift, "advantages": ADVANTAGES, "weights": HALVES}
    loss = trainer.compute_loss(trainer.model, batch | {"loss_weight": 0.5, "measure_kl": False})
    found = surrogates(low, high)
    if by_place:  # on the right, the ratio is 1
        found = [0.75 * left + 0.25 * float(right) for left, right in zip(found, ADVANTAGES, strict=True)]
    assert loss.item() == pytest.approx(-0.5 * sum(found) / 4, rel=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_beta_times_the_kl_is_added_to_the_loss(make_trainer, beta):
    """The ratio is 1 everywhere; the KL is the normal distributions', a mean over latent values."""
    trainer = make_trainer(beta=beta)
    policy, schedule, generator = trainer.policy, trainer.schedule, torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in policy.network.named_parameters():
            if "lora_B" in name:
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    batch = next(trainer.rollout(0))
    steps, conditioning, normals = torch.full((4,), batch["step"]), policy.encode(batch["prompts"]), []
    for place in (nullcontext(), policy.reference()):
        with torch.no_grad(), place:
            output = policy.predict(policy.network, batch["latents"], schedule.timesteps[steps], conditioning)
        normals.append(torch.distributions.Normal(*step_mean(output, batch["latents"], steps, schedule)))
    kl = float(torch.distributions.kl_divergence(*normals).mean())
    assert kl > 1e-3
    loss = trainer.compute_loss(trainer.model, batch | {"advantages": ADVANTAGES, "loss_weight": 0.5})
    assert loss.item() == pytest.approx(-0.5 * float(ADVANTAGES.mean()) + beta * kl, abs=1e-2 * kl)
    assert [float(value) for value in trainer._metrics["kl"]] == pytest.approx([kl], rel=1e-3)


# ---- Which steps ----

AUTO = {
    "train_steps": ["auto:2"], "num_inference_steps": 5, "generation_batch_size": 16, "gradient_accumulation_steps": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "asked"), [({}, 2), ({"watch_limits": {"kl": None}}, 0), ({"beta": 0.1}, 4)], ids=str
)
def test_the_base_is_asked_as_often_as_the_kl_is_wanted(make_trainer, monkeypatch, settings, asked):
    """Of a rollout of two micro-batches at two steps: once a step for the monitor, everywhere for the loss."""
    trainer, references = make_trainer(num_train_epochs=1, save_strategy="no", **settings), []
    reference = trainer.policy.reference
    monkeypatch.setattr(trainer.policy, "reference", lambda: references.append(1) or reference())
    trainer.train()
    assert len(references) == asked
    assert ("kl" in trainer.watch.off) == (asked == 0)


def test_a_rollout_trains_the_steps_that_were_chosen_behind_the_one_before(make_trainer):
    trainer = make_trainer(**AUTO)
    rows = list(trainer.rollout(0))
    assert [row["step"] for row in rows] == [0, 1] * 4
    assert [row["measured_as"] for row in rows] == [(chunk, k) for chunk in range(4) for k in range(2)]

    def choose(sketches, reach):
        trainer.probe.window = (2, 3)
        return {1: 0.5}

    trainer.probe.learn, trainer._sketch.renew = choose, lambda mean: 1.0
    for row in rows:
        trainer._measured(row["measured_as"], torch.ones(3))
    assert [row["step"] for row in trainer.rollout(1)] == [2, 3] * 4
    assert [float(value) for value in trainer._metrics["probe/snr_step_1"]] == [0.5]


@pytest.mark.parametrize(
    ("settings", "cost", "chunks"),
    [
        ({}, 5 + 3 * 2, 4),
        ({"beta": 0.1, "num_iterations": 2, "gradient_accumulation_steps": 4}, 5 + 4 * 2 * 2, 2),
        ({"share_noise": "before"}, 2 / 4 + 3 + 3 * 1.25, 4),  # of 4 pictures one up to step 1, and in its update
        ({"share_noise": "before", "per_device_rollout_batch_size": 2}, 2 / 2 + 3 + 3 * 1.25, 4),  # one of each batch
        ({"share_noise": "before", "per_device_rollout_batch_size": 6}, 2 / 3 + 3 + 3 * 1.25, 4),  # 4 and 2, 2 and 4
        ({"guidance_scale": 3.0, "train_guidance": False}, 2 * 5 + 2 + 3 * 2, 4),
    ],
    ids=str,
)
def test_the_probe_knows_what_a_rollout_costs_and_how_many_chunks_an_update_has(make_trainer, settings, cost, chunks):
    probe = make_trainer(**{**AUTO, **settings}).probe
    assert probe.windows == [(0, 1), (1, 2), (2, 3)]
    assert probe._chunks == chunks
    assert probe._costs[1] == pytest.approx(cost)


# ---- What is compared, and where it counts ----


def scored(totals, maps=None, objectives=None, features=None, thumbnails=None):
    """A batch of pictures with these rewards."""
    totals, count = torch.tensor(totals), len(totals)
    grid, objectives = torch.zeros(1, count, 1, 2, 2), totals if objectives is None else torch.tensor(objectives)
    return ScoredBatch(
        trajectory=Trajectory(torch.tensor([0]), grid, grid, grid[:, :, 0], grid[0]),
        maps=maps,
        values={"objective": objectives, "total": totals, "edge_energy": torch.ones(count)},
        measures={},
        thumbnails=torch.zeros(count, 3, 1, 1) if thumbnails is None else thumbnails,
        features=features,
        samples=None,
    )


def gathered(args, *batches, prompts=None, rank=0, gather=lambda values: values):
    """The experience of these batches, in groups of 4 unless `prompts` says otherwise, seen for the first time."""
    count = sum(len(batch.values["total"]) for batch in batches)
    prompts = prompts or [f"prompt {place // 4}" for place in range(count)]
    statistics = PromptStatistics(args.prompt_buffer_size, args.prompt_min_count)
    return gather_experience(batches, prompts, args, gather, rank, statistics)


NEAR, FAR = [0.0, 0.0, 0.0, 4.0], [1.0, 1.0, 3.0, 3.0]
"""Two groups: mean 1 and std sqrt(3); mean 2 and std 1. Together: mean 1.5, squares' mean 4.5, std 1.5."""
BY_PROMPT = {"advantage_baseline": "prompt", "prompt_min_count": 2}
BY_BATCH = {"advantage_baseline": "batch"}


@pytest.mark.parametrize(
    ("settings", "near", "far"),
    [
        ({}, [-(3**-0.5)] * 3 + [3**0.5], [-1, -1, 1, 1]),
        ({"advantage_clip": 0.8}, [-(3**-0.5)] * 3 + [0.8], [-0.8, -0.8, 0.8, 0.8]),
        ({"advantage_std_floor": 2.0}, [-0.5, -0.5, -0.5, 1.5], [-0.5, -0.5, 0.5, 0.5]),
        ({"scale_rewards": "none"}, [-1, -1, -1, 3], [-1, -1, 1, 1]),
        ({"scale_rewards": "none", "advantage_clip": 2.0}, [-1, -1, -1, 2], [-1, -1, 1, 1]),
        ({"scale_rewards": "batch"}, [-(2**-0.5)] * 3 + [3 * 2**-0.5], [-(2**-0.5)] * 2 + [2**-0.5] * 2),
        ({"scale_rewards": "batch", "advantage_std_floor": 2.0}, [-0.5, -0.5, -0.5, 1.5], [-0.5, -0.5, 0.5, 0.5]),
    ],
    ids=str,
)
@pytest.mark.parametrize("baseline", [{}, BY_PROMPT], ids=["group", "prompt"])
def test_advantages_are_clipped_scaled_and_floored_as_the_settings_say(make_args, baseline, settings, near, far):
    """Where a prompt has no rewards from before, its own are the group's."""
    experience = gathered(make_args(**baseline, **settings), scored(NEAR), scored(FAR))
    assert experience.advantages.tolist() == pytest.approx([*near, *far])
    assert torch.equal(experience.weights, torch.ones(8, 2, 2))


def test_groups_below_the_least_std_are_skipped_and_the_others_count_for_them(make_args):
    for least, near, far, skipped in ((0.9, 3**0.5, 1, 0), (1.5, 2 * 3**0.5, 0, 0.5), (2.0, 0, 0, 1)):
        experience = gathered(make_args(min_group_std=least), scored(NEAR), scored(FAR))
        assert experience.advantages[[3, 7]].tolist() == pytest.approx([near, far])
        assert experience.metrics["groups_skipped"] == skipped


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({}, [-1, -1, -1, 5 / 3, -1 / 3, -1 / 3, 1, 1]),
        ({"advantage_clip": 0.8}, [-0.8, -0.8, -0.8, 0.8, -1 / 3, -1 / 3, 0.8, 0.8]),
        ({"advantage_std_floor": 5.0}, [-0.3, -0.3, -0.3, 0.5, -0.1, -0.1, 0.3, 0.3]),
        ({"scale_rewards": "none"}, [-1.5, -1.5, -1.5, 2.5, -0.5, -0.5, 1.5, 1.5]),
    ],
    ids=str,
)
def test_the_whole_rollout_is_compared_likewise(make_args, settings, found):
    experience = gathered(make_args(**BY_BATCH, **settings), scored(NEAR + FAR))
    assert experience.advantages.tolist() == pytest.approx(found)


@pytest.mark.parametrize(("count", "found"), [(2, [-1, -1, -1, 1]), (8, [-1.5, -1.5, -1.5, 2.5])])
def test_a_prompts_own_statistics_hold_from_its_minimum_on_and_over_its_buffer(make_args, count, found):
    """A buffer of 2 remembers 0 and 4, mean 2 and std 2; below the minimum, the rollout's mean is 1.5."""
    settings = {"prompt_buffer_size": 2, "prompt_min_count": 2} if count == 2 else {"prompt_min_count": count}
    unscaled = {"scale_rewards": "group" if count == 2 else "none"}
    args = make_args(advantage_baseline="prompt", **settings, **unscaled)
    assert gathered(args, scored(NEAR + FAR)).advantages[:4].tolist() == pytest.approx(found)


def test_only_scalar_credit_compares_totals(make_args):
    batch = scored(FAR, objectives=NEAR)
    for credit, found in (("image", [-(3**-0.5)] * 3 + [3**0.5]), ("scalar", [-1, -1, 1, 1])):
        assert gathered(make_args(credit=credit), batch).advantages.tolist() == pytest.approx(found), credit


def test_a_rank_keeps_its_own_pictures_of_what_all_compared(make_args):
    """The second of two ranks, each with 2 pictures of one group."""
    others = iter([scored(NEAR[:2]).values[name] for name in ("objective", "total", "edge_energy")])
    experience = gathered(
        make_args(), scored(NEAR[2:]), prompts=["a", "a", "a", "b"], rank=1,
        gather=lambda mine: torch.cat([next(others, mine), mine]),
    )  # fmt: skip
    assert experience.advantages.tolist() == pytest.approx([-(3**-0.5), 3**0.5])
    assert experience.prompts == ["a", "b"]
    assert experience.weights.shape == (2, 2, 2)


@pytest.mark.parametrize("floor", [0.0, 0.5, 1.0])
def test_a_place_outside_the_focus_has_the_weight_of_the_floor(make_args, floor):
    """A penalty at one of four places has there the rest: floor + 4 * (1 - floor)."""
    maps = torch.zeros(4, 2, 2)
    maps[:, 1, 0] = 0.3
    weights = gathered(make_args(credit="focus", focus_floor=floor), scored(NEAR, maps)).weights
    assert weights[3].flatten().tolist() == pytest.approx([floor, floor, 4 - 3 * floor, floor])


PAID = {"credit": "paid", "importance_sampling_level": "location"}


@pytest.mark.parametrize(
    ("settings", "own", "other"),
    [
        ({"advantage_clip": 99.0, "advantage_std_floor": 4.0}, -3 / 4, 3 / 4),
        ({"advantage_clip": 99.0}, -(3**0.5), 3**0.5),
        ({"advantage_clip": 1.25}, -1.25, 1.25),
        ({"advantage_clip": 99.0, "paid_reach": 1}, -(3**0.5), -(3**0.5)),  # one place away is everywhere in 2 x 2
        ({"advantage_clip": 99.0, "paid_scale": "unit"}, 0, 3**0.5),
        ({"advantage_clip": 99.0, "paid_scale": "unit", "paid_weight": 2.0}, -(3**0.5), 3**0.5),
        ({"advantage_clip": 1.25, "paid_scale": "unit", "paid_weight": 3.0}, -1.25, 1.25),
        ({"advantage_clip": 99.0, "paid_scale": "unit", "advantage_std_floor": 20.0}, 3 / 20 - 24 / 20, 3 / 20),
    ],
    ids=str,
)
def test_what_a_place_is_paid_is_clipped_and_scaled_as_the_settings_say(make_args, settings, own, other):
    """The last of 4 pictures has a total 3 above the mean of 1, and a penalty of 32 at one of four places, 24 above the
    group's mean there: 6 of its objective, which is 3 below the mean, at a std of sqrt(3)."""
    maps = torch.zeros(4, 2, 2)
    maps[3, 1, 0] = 32.0
    experience = gathered(make_args(**PAID, **settings), scored(NEAR, maps, objectives=[0.0, 0.0, 0.0, -4.0]))
    assert torch.equal(experience.advantages, torch.ones(4))
    assert experience.weights[3].flatten().tolist() == pytest.approx([other, other, own, other])


def test_the_rewards_features_are_what_diversity_is_watched_in(make_args):
    """Pictures of grey levels 0 or 1, half of each, two thirds of whose pairs differ; features all alike or far off."""
    thumbnails = torch.tensor([0.0, 0.0, 1.0, 1.0])[:, None, None, None].expand(4, 3, 1, 1)
    plain = gathered(make_args(), scored(NEAR, thumbnails=thumbnails))
    assert plain.measures["diversity"] == plain.metrics["diversity"] == pytest.approx(2 / 3)
    for features, found in ((torch.ones(4, 2), 0.0), (torch.eye(4), 2**0.5 / 2)):  # a distance of sqrt(2), in 4 numbers
        seen = gathered(make_args(), scored(NEAR, thumbnails=thumbnails, features=features))
        assert seen.measures["diversity"] == pytest.approx(found)
        assert seen.metrics["diversity"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(("floor", "dead"), [(0.5, 0.0), (1.5, 0.5), (2.0, 1.0)])
def test_a_group_is_dead_below_the_std_that_is_divided_by(make_args, floor, dead):
    experience = gathered(make_args(advantage_std_floor=floor), scored(NEAR), scored(FAR))
    assert experience.measures["dead_groups"] == dead


# ---- The reward ----


class Counting(Plain):
    """Notes how many pictures it is asked about at once."""

    def __init__(self):
        self.asked, self.looked = [], []

    def __call__(self, images, prompts):
        self.asked.append(len(images))
        return super().__call__(images, prompts)

    def features(self, images):
        self.looked.append(len(images))
        return images.mean(dim=(2, 3))


def test_rewards_are_asked_about_as_many_pictures_at_once_as_they_take(make_trainer):
    """In rollouts, whose batches are of four, and in evaluations, of five."""
    reward, held_out = Counting(), Counting()
    trainer = make_trainer(reward, held_out=held_out, num_train_epochs=1, reward_batch_size=3, save_strategy="no")
    trainer.train()
    assert reward.asked == held_out.asked == reward.looked == [3, 1, 3, 1]
    reward.asked.clear()
    trainer.args.per_device_eval_batch_size = 5
    trainer.judge(HeldOut(PROMPTS[:5], {TRAINING_REWARD: reward}, generations=1, num_samples=5))
    assert set(reward.asked) == {3, 2}


def test_a_reward_that_takes_one_picture_at_a_time_is_tried_so(make_args, pipeline_folder):
    def one(images, prompts):
        (image,) = images
        return Reward(total=image.mean()[None])

    said = try_rewards({"one": one}, pipeline_folder, make_args(reward_batch_size=1), PROMPTS[0])
    assert said["one"].total.tolist() == [0.5, 0.5]
