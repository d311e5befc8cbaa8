"""What the pictures of a group have in common is computed once, and nothing but the work is less."""

import pytest
import torch

from rl.experience import rollout_noise
from rl.rollout import sample, shared_places
from rl.rollout_plan import passes
from rl.sde import ddim_scheduler, make_schedule
from rl.trunks import Trunks
from tests.rl.conftest import PROMPTS
from tests.rl.outcomes import logged
from tests.rl.test_adapter import load, trained

GROUP = {"share_noise": "around", "num_generations": 4, "generation_batch_size": 8, "train_steps": ["1:3"],
         "num_inference_steps": 4}  # fmt: skip


def rows_seen(network):
    """How many pictures the network was asked about at once; a list that is filled as it is."""
    seen = []
    network.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    return seen


def test_a_group_in_two_batches_is_in_both():
    trunks = Trunks.of_groups([6, 7, 8, 9, 10, 11, 12], group=4)
    assert trunks.first.tolist() == [0, 2, 6]
    assert trunks.of.tolist() == [0, 0, 1, 1, 1, 1, 2]


@pytest.mark.parametrize("guidance", [(1.0, True), (3.0, True), (3.0, False)], ids=["none", "trained", "untrained"])
def test_the_same_pictures_for_less_work(pipeline_folder, guidance):
    policy = trained(load(pipeline_folder))
    schedule = make_schedule(ddim_scheduler(policy.scheduler), 4, eta=1.0)
    prompts = [prompt for prompt in PROMPTS[:2] for _ in range(3)]
    noise = rollout_noise(policy, schedule, 0, 0, range(6), 3, shared_places("around", [1, 2], 4))
    seen = rows_seen(policy.network)
    drawn = []
    for trunks in (None, Trunks.of_groups(range(6), 3)):
        seen.clear()
        drawn.append(sample(policy, policy.network, prompts, noise, schedule, [1, 2], *guidance, trunks=trunks))
        drawn.append(list(seen))
    each, asked_each, once, asked_once = drawn
    for name in ("latents", "next_latents", "log_probs", "final_latents"):
        torch.testing.assert_close(getattr(once, name), getattr(each, name), rtol=1e-4, atol=1e-4)
    assert torch.equal(once.latents[0, :3], once.latents[0, :1].expand(3, -1, -1, -1))
    assert not torch.equal(once.latents[1, 0], once.latents[1, 1])
    calls = {1.0: [2, 2, 6, 6], 3.0: [4, 4, 12, 12] if guidance[1] else [4, 4, 2, 12, 6, 12]}[guidance[0]]
    assert asked_once == calls
    assert max(asked_each[:2]) == max(asked_each)


@pytest.mark.parametrize("text", [False, True], ids=["network", "text encoder too"])
def test_a_training_is_the_same_and_its_ratio_is_exactly_one(make_trainer, monkeypatch, text):
    """Losses, gradients and KL of a group at the step that parts it are those of its pictures one by one."""
    settings = {**GROUP, "beta": 0.1, "optim": "sgd", "learning_rate": 0.02, "train_text_encoder": text}
    once = make_trainer(**settings)
    seen = rows_seen(once.policy.network)
    once.train()
    assert set(logged(once, "ratio")) == {1.0}
    fewer = sum(seen)
    monkeypatch.setattr("rl.ddpo.DDPOTrainer.trunks", lambda *_: None)
    each = make_trainer(**settings)
    seen = rows_seen(each.policy.network)
    each.train()
    assert fewer < 0.75 * sum(seen)
    for name in ("loss", "grad_norm", "kl", "reward"):
        # A batch of fewer rows is rounded otherwise, by some 1e-6 of a loss in which ones of either sign cancel.
        assert logged(once, name) == pytest.approx(logged(each, name), rel=1e-3, abs=1e-5), name
    assert max(logged(each, "grad_norm")) > 0
    for mine, theirs in zip(once.trained_weights(), each.trained_weights(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{"share_noise": "none"}, {"credit": "words"}],
    ids=["nothing shared", "words"],
)
def test_where_pictures_differ_or_each_is_looked_at_none_is_left_out(make_trainer, changes):
    trainer = make_trainer(**GROUP | changes)
    assert trainer.trunks(range(4)) is None
    assert make_trainer(**GROUP).trunks(range(4)).first.tolist() == [0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train_steps": ["2", "3"], "num_inference_steps": 6},
        {"share_noise": "none"},
        {"credit": "words"},
        {"guidance_scale": 3.0},
        {"guidance_scale": 3.0, "train_guidance": False},
        {"num_iterations": 2, "beta": 0.1},
    ],
    ids=["early", "late", "nothing shared", "words", "guided", "guided, not trained", "twice, with KL"],
)
def test_the_cost_of_a_rollout_is_what_the_network_is_asked(make_trainer, changes):
    trainer = make_trainer(num_train_epochs=1, **GROUP | changes)
    asked, drawn, collect = [], [], trainer.collect  # asked: (whether with a gradient, how many pictures)
    trainer.policy.pipeline.unet.conv_in.register_forward_pre_hook(
        lambda _, arguments: asked.append((torch.is_grad_enabled(), len(arguments[0])))
    )

    def collected(number):
        experience = collect(number)
        drawn.extend(rows for _, rows in asked)
        asked.clear()
        return experience

    trainer.collect = collected
    trainer.train()
    updated = sum(rows * (3 if graded else 1) for graded, rows in asked if graded or trainer.args.beta > 0)
    found = passes(trainer.args, trainer.train_steps, trainer.args.num_inference_steps)
    assert found == pytest.approx((sum(drawn) + updated) / 8)
