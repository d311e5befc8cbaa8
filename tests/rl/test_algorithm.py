"""The choices of the algorithm, each through the trainer: which steps, what is compared, where it counts."""

import pytest
import torch

from reward.feedback import Reward
from rl.gradient_sketch import WIDTH, random_signs
from tests.rl.conftest import args_of, trainer_of
from tests.rl.outcomes import assert_resumes_to_the_bit, logged, lora
from tests.rl.toy_rewards import Redness


class Constant(Redness):
    """Its map is the same everywhere, and no word costs anything."""

    def __init__(self):
        super().__init__(constant_map=True)

    def __call__(self, images, prompts):
        reward = super().__call__(images, prompts)
        silent = [torch.zeros_like(words) for words in reward.word_penalties]
        return Reward(reward.total, reward.penalties, silent, reward.terms)


def update_by_a_constant_map(pipeline_folder, folder, **settings):
    """The LoRA behind one update by SGD."""
    settings = {"num_train_epochs": 1, "optim": "sgd", "learning_rate": 1.0, **settings}
    args = args_of(folder, **{"importance_sampling_level": "location", **settings})
    trainer_of(pipeline_folder, args, Constant()).train()
    return lora(folder / "checkpoint-1")


@pytest.fixture(scope="module")
def by_image(pipeline_folder, tmp_path_factory):
    return update_by_a_constant_map(pipeline_folder, tmp_path_factory.mktemp("image"))


@pytest.mark.parametrize(
    "changes",
    [
        {"credit": "scalar"},
        {"credit": "words"},
        {"credit": "mask"},
        {"credit": "paid", "importance_sampling_level": "location"},
        {"credit": "paid", "importance_sampling_level": "location", "paid_scale": "unit"},
    ],
    ids=str,
)
def test_a_map_that_is_the_same_everywhere_makes_every_credit_image(pipeline_folder, by_image, tmp_path, changes):
    """Without word penalties for `words`; `unit` pays for differences within the group, and there are none."""
    other = update_by_a_constant_map(pipeline_folder, tmp_path, **changes)
    assert by_image.keys() == other.keys()
    for name in by_image:
        # The gradient's norm is 1.5; sums over places are rounded differently.
        torch.testing.assert_close(by_image[name], other[name], rtol=1e-4, atol=1e-6)


def test_words_credit_acts_where_the_wrong_words_attention_was(make_trainer):
    trainer = make_trainer(credit="words", num_train_epochs=1)
    trainer.train()
    weights = trainer.experience.weights
    torch.testing.assert_close(weights.mean(dim=(1, 2)), torch.ones(8))
    assert weights.std() > 0
    assert logged(trainer, "ratio_deviation")[0] == 0


def test_words_credit_needs_words(make_trainer):
    class Wordless(Redness):
        def __call__(self, images, prompts):
            return Reward(super().__call__(images, prompts).total)

    with pytest.raises(ValueError, match="credit words needs a reward that says what each word costs"):
        make_trainer(Wordless(), credit="words")


def test_paid_credit_is_what_each_places_log_prob_is_multiplied_by(make_trainer):
    trainer = make_trainer(
        credit="paid", paid_reach=7, importance_sampling_level="location", num_train_epochs=1, optim="sgd"
    )
    image = make_trainer(importance_sampling_level="location", num_train_epochs=1, optim="sgd")
    experiences = [next_experience(one) for one in (trainer, image)]
    paid, plain = (one.advantages[:, None, None] * one.weights for one in experiences)
    torch.testing.assert_close(paid, plain, rtol=1e-4, atol=1e-4)  # 7 places away is everywhere in 8 x 8


def next_experience(trainer):
    next(trainer.rollout(0))
    return trainer.experience


def test_a_fraction_of_the_steps_is_drawn_anew_for_each_rollout(make_trainer):
    settings = {"num_inference_steps": 6, "train_steps": ["all"], "timestep_fraction": 0.3}
    trainer = make_trainer(**settings)
    drawn = [trainer._steps_of(number) for number in range(8)]
    assert {len(steps) for steps in drawn} == {2}  # a third of five, rounded up
    assert len(set(drawn)) > 2
    assert drawn == [make_trainer(**settings)._steps_of(number) for number in range(8)]
    trainer.train()
    assert tuple(trainer.experience.trajectory.steps.tolist()) == drawn[1]


def test_outside_the_window_steps_are_deterministic(make_trainer):
    settings = {"num_inference_steps": 4, "sde_window": "1:3", "train_steps": ["all"]}
    trainer = make_trainer(**settings)
    assert trainer.train_steps == (1, 2)
    assert (trainer.schedule.stds > 0).tolist() == [False, True, True, False]
    trainer.train()
    assert logged(trainer, "ratio_deviation")[0] == 0
    with pytest.raises(ValueError, match="names step 0, which is deterministic"):
        make_trainer(**{**settings, "train_steps": ["0"]})
    with pytest.raises(ValueError, match="sde_window is '3:1'"):
        make_trainer(**{**settings, "sde_window": "3:1"})


SLIDING = {"num_inference_steps": 5, "sde_window": "0:2", "sde_window_interval": 1, "train_steps": ["all"]}


def test_a_sliding_window_goes_on_where_it_was(make_trainer, tmp_path):
    """Rollouts 0 to 3 train 0:2, 1:3, 2:4 and, as the fifth step is deterministic, 2:4 again."""
    settings = {**SLIDING, "learning_rate": 0.05, "timestep_weighting": "std"}
    whole = make_trainer(num_train_epochs=4, output_dir=str(tmp_path / "whole"), **settings)
    rollouts, collect = [], whole.collect

    def noting(number):
        experience = collect(number)
        rollouts.append(experience.trajectory.steps.tolist())
        return experience

    whole.collect = noting
    whole.train()
    assert rollouts == [[0, 1], [1, 2], [2, 3], [2, 3]]
    assert logged(whole, "sde_window") == [0, 1, 2, 2]
    assert logged(whole, "ratio_deviation") == [0] * 4
    assert (whole.rollout_schedule.stds > 0).tolist() == [False, False, True, True, False]
    assert (whole.schedule.stds > 0).tolist() == [True, True, False, False, False], "what evaluations sample with"
    make_trainer(num_train_epochs=2, **settings).train()
    rest = make_trainer(num_train_epochs=4, **settings)
    rest.train(resume_from_checkpoint="latest")
    assert all(map(torch.equal, rest.trained_weights(), whole.trained_weights()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sde_window": None}, "sde_window_interval moves sde_window, which is not set"),
        ({"train_steps": ["1"]}, "train_steps is 1, but .* set train_steps to all"),
        ({"sde_window_interval": 0}, "sde_window_interval is 0; it must be at least 1"),
        ({"sde_window_stride": 0}, "sde_window_stride is 0; it must be at least 1"),
        ({"sde_window": "3:5"}, "let it end at 4 at most"),
    ],
)
def test_windows_that_cannot_slide(make_trainer, changes, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**{**SLIDING, **changes})


def test_weights_of_the_steps_go_into_the_loss(make_trainer):
    """One update by SGD: the weighted loss' gradient is the sum of the steps' own, weighted."""
    moves = {}
    common = {"num_train_epochs": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
    for name, changes in {
        "both": {"timestep_weighting": "std"},
        "0": {"train_steps": ["0"], "gradient_accumulation_steps": 2},
        "1": {"train_steps": ["1"], "gradient_accumulation_steps": 2},
    }.items():
        trainer = make_trainer(**{**common, "lr_scheduler_type": "constant", **changes})
        before = [weight.detach().clone() for weight in trainer.trained_weights()]
        trainer.train()
        moves[name] = [after - old for after, old in zip(trainer.trained_weights(), before, strict=True)]
    stds = trainer.schedule.stds[:2] / trainer.schedule.stds[:2].mean()
    for both, first, second in zip(moves["both"], moves["0"], moves["1"], strict=True):
        torch.testing.assert_close(both, (stds[0] * first + stds[1] * second) / 2, rtol=1e-3, atol=1e-7)


def test_without_guidance_in_training_an_update_costs_half(make_trainer):
    rows = {}
    for guided in (True, False):
        trainer = make_trainer(guidance_scale=3.0, train_guidance=guided, num_train_epochs=1)
        rows[guided] = []
        trainer.policy.network.register_forward_pre_hook(
            lambda _, inputs, guided=guided: rows[guided].append(len(inputs[0])) if torch.is_grad_enabled() else None
        )
        trainer.train()
        assert logged(trainer, "ratio_deviation")[0] == 0
        assert logged(trainer, "kl")[0] == 0
    assert rows == {True: [8] * 4, False: [4] * 4}


def test_statistics_of_a_prompt_replace_its_group(make_trainer, tmp_path):
    settings = {
        "advantage_baseline": "prompt", "num_generations": 1, "prompt_buffer_size": 4, "prompt_min_count": 2,
        "learning_rate": 0.05,
    }  # fmt: skip
    trainer, _ = assert_resumes_to_the_bit(make_trainer, tmp_path, **settings)
    seen = trainer.statistics.state()
    assert sum(map(len, seen.values())) > 8
    assert all(len(rewards) <= 4 for rewards in seen.values())


def test_the_whole_rollout_may_be_compared(make_trainer):
    trainer = make_trainer(advantage_baseline="batch", num_train_epochs=1)
    experience = next_experience(trainer)
    assert experience.advantages.mean().abs() < 1e-5
    assert experience.advantages.view(-1, 4).mean(dim=1).abs().max() > 1e-3  # the groups' means are not 0


def test_groups_that_are_alike_are_counted(make_trainer):
    trainer = make_trainer(min_group_std=10.0, num_train_epochs=1)
    trainer.train()
    assert logged(trainer, "groups_skipped") == [1.0]
    assert logged(trainer, "grad_norm")[0] == 0


def test_a_drawn_step_weighs_what_it_does_among_all_that_are_trained(make_trainer):
    trainer = make_trainer(timestep_weighting="std", timestep_fraction=0.5, gradient_accumulation_steps=2)
    stds = trainer.schedule.stds[list(trainer.train_steps)]
    seen = {row["step"]: row["loss_weight"] for number in range(4) for row in trainer.rollout(number)}
    assert set(seen) == set(trainer.train_steps)
    assert len(seen) == 2
    for place, step in enumerate(trainer.train_steps):
        assert seen[step] == pytest.approx(float(stds[place] / stds.mean()))


def test_what_a_run_leaves_behind_is_the_average_of_its_weights(make_trainer, tmp_path):
    trainer = make_trainer(
        num_train_epochs=3, ema_decay=0.5, save_total_limit=None, learning_rate=0.05, output_dir=str(tmp_path / "run")
    )
    average = [weight.detach().clone() for weight in trainer.trained_weights()]
    trainer.train()
    trainer.save_model()
    names = [name for name, weight in trainer.policy.network.named_parameters() if weight.requires_grad]
    for step in (1, 2, 3):
        weights = lora(tmp_path / f"run/checkpoint-{step}")
        decay = 0.0 if step == 1 else 0.5  # the average begins behind the first update
        for place, name in enumerate(names):
            key = name.removeprefix("base_model.model.").replace(".default", "")
            average[place] = decay * average[place] + (1 - decay) * weights[f"unet.{key}"]
    final = lora(tmp_path / "run")
    for place, name in enumerate(names):
        key = name.removeprefix("base_model.model.").replace(".default", "")
        torch.testing.assert_close(final[f"unet.{key}"], average[place])


def test_averages_resume_to_the_bit(make_trainer, tmp_path):
    assert_resumes_to_the_bit(make_trainer, tmp_path, ema_decay=0.5, learning_rate=0.05)


AUTO = {
    "train_steps": ["auto:2"], "num_inference_steps": 5, "generation_batch_size": 16, "gradient_accumulation_steps": 8,
}  # fmt: skip


def test_auto_measures_the_steps_that_it_trains(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr("rl.step_probe.OPTIMISM", 50.0)  # so that windows do take turns in so few rollouts
    trainer, _ = assert_resumes_to_the_bit(make_trainer, tmp_path, **AUTO)
    trained = [logged(trainer, f"probe/trained_step_{step}") for step in range(4)]
    lately = [[step for step in range(4) if trained[step][rollout]] for rollout in range(4)]
    assert lately[:2] == [[0, 1], [0, 1]], "the first rollout makes the gradients' scale"
    assert all(steps in ([0, 1], [1, 2], [2, 3]) for steps in lately)
    assert lately[2] == [1, 2]
    assert tuple(trainer.experience.trajectory.steps.tolist()) == tuple(lately[-1])
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    told = [[step for step in range(4) if f"probe/snr_step_{step}" in entry] for entry in entries]
    assert told == [[], *lately[1:]]
    assert logged(trainer, "ratio_deviation")[0] == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_steps": ["auto:1"], "gradient_accumulation_steps": 4}, "made by training 2 steps of its own choice"),
        ({"num_inference_steps": 6}, r"measured the steps \[0, 1, 2, 3\], and .* from \[0, 1, 2, 3, 4\]"),
    ],
)
def test_what_was_measured_is_of_no_use_to_other_choices(make_trainer, changes, said):
    make_trainer(num_train_epochs=1, **AUTO).train()
    with pytest.raises(ValueError, match=said):
        make_trainer(num_train_epochs=2, **{**AUTO, **changes}).train(resume_from_checkpoint="latest")
    named = make_trainer(num_train_epochs=2, **{**AUTO, "train_steps": ["0", "3"]})
    named.train(resume_from_checkpoint="latest")
    assert named.train_steps == (0, 3)


@pytest.mark.parametrize(("batch", "measured"), [(4, 2), (8, 1)], ids=["the same chunks", "larger ones"])
def test_measurements_of_other_chunks_are_not_gone_on_with(make_trainer, batch, measured):
    settings = AUTO | {"generation_batch_size": 32, "gradient_accumulation_steps": 16}
    make_trainer(num_train_epochs=2, **settings).train()
    settings |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 64 // batch}
    trainer = make_trainer(num_train_epochs=3, **settings)
    trainer.train(resume_from_checkpoint="latest")
    assert len(trainer.probe.state()) == measured, "the first rollout makes the gradients' scale"


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"activation_checkpointing": True}, {"beta": 0.1}], ids=str)
def test_what_is_measured_is_what_the_update_goes_by(make_trainer, settings):
    """The sketches of an update by SGD, averaged, are the sketch of what it moves against."""
    trainer = make_trainer(
        **AUTO, **settings, num_train_epochs=1, optim="sgd", learning_rate=1.0, max_grad_norm=0.0,
        lr_scheduler_type="constant",
    )  # fmt: skip
    count = sum(weight.numel() for weight in trainer.trained_weights())
    trainer._sketch.load({"scale": torch.ones(count)})
    told, learn = [], trainer.probe.learn
    trainer.probe.learn = lambda *measured: told.append(measured) or learn(*measured)
    before = torch.cat([weight.detach().clone().flatten() for weight in trainer.trained_weights()])
    trainer.train()
    moved = before - torch.cat([weight.detach().flatten() for weight in trainer.trained_weights()])
    ((sketches, reach),) = told
    assert sketches.shape == (4, 2, WIDTH)
    signed = moved * random_signs(count)
    expected = torch.zeros(WIDTH).index_add(0, torch.arange(count) % WIDTH, signed)
    torch.testing.assert_close(sketches.mean(dim=(0, 1)), expected, rtol=1e-3, atol=1e-7)
    assert expected.norm() > 1e-4
    length = float(logged(trainer, "grad_norm")[0])
    assert reach / trainer.experience.metrics["group_std"] > length, (
        "a micro-batch's gradient is longer than their mean"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_steps": ["auto:x"]}, "train_steps 'auto:x' is not understood"),
        ({"train_steps": ["auto", "1"]}, "train_steps 'auto 1' is not understood"),
        ({"train_steps": ["auto:3"]}, "only 2 steps have noise"),
        ({"train_steps": ["auto:1"]}, "chunks of 4 pictures.*a rollout of 8 has not.*multiple of 4 from 12 on"),
        ({"train_steps": ["auto:1"], "timestep_fraction": 0.5}, "timestep_fraction does not go with"),
        ({"train_steps": ["auto:1"], "timestep_weighting": "std"}, "timestep_weighting is std, but train_steps auto"),
        ({"train_steps": ["auto:1"], "advantage_baseline": "batch"}, "advantages must be within groups"),
        ({"share_noise": "before", "advantage_baseline": "prompt"}, "share_noise before helps by cancelling"),
        ({"model_dtype": "float16"}, "model_dtype is float16 without fp16"),
        ({"timestep_fraction": 0}, "timestep_fraction is 0"),
        ({"credit": "paid"}, "set importance_sampling_level to location"),
        ({"credit": "paid", "importance_sampling_level": "location", "scale_rewards": "none"}, "must be group"),
        ({"advantage_baseline": "prompt", "prompt_buffer_size": 4}, r"prompt_buffer_size \(4\) is below"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"epsilon_high": 0.0}, "epsilon_high is 0.0"),
        ({"min_group_std": -1.0}, "min_group_std is -1.0"),
        ({"advantage_baseline": "sometimes"}, "advantage_baseline is 'sometimes'"),
    ],
)
def test_wrong_settings_are_named(make_trainer, changes, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**changes)
