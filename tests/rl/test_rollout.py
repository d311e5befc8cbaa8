import math

import pytest
import torch

from reward.feedback import Reward
from rl.experience import rollout_noise
from rl.keyed import keyed_noise
from rl.monitors import diversity, edge_energy
from rl.policy import StableDiffusionPolicy
from rl.rollout import draw_prompts, sample, shared_places
from rl.scoring import RewardError, score
from rl.sde import ddim_scheduler, make_schedule
from tests.rl.conftest import PROMPTS


@pytest.fixture(scope="module")
def policy(pipeline_folder):
    return StableDiffusionPolicy.load(pipeline_folder, lora_rank=2, seed=1)


def test_noise_depends_on_its_key_only():
    together = keyed_noise(1, 5, range(6), (3, 2))
    apart = torch.cat([keyed_noise(1, 5, [place], (3, 2)) for place in (0, 1, 2, 3, 4, 5)])
    assert torch.equal(together, apart)
    assert len({float(row.sum()) for row in together}) == 6
    assert not torch.equal(together, keyed_noise(1, 6, range(6), (3, 2)))
    assert not torch.equal(together, keyed_noise(2, 5, range(6), (3, 2)))
    assert keyed_noise(0, 0, range(400), (10,)).std().item() == pytest.approx(1, abs=0.05)


def test_prompts_come_round_evenly_and_do_not_depend_on_the_past():
    drawn = [draw_prompts(PROMPTS, 3, rollout, seed=0) for rollout in range(5)]
    flat = [prompt for prompts in drawn for prompt in prompts]
    assert all(sorted(flat[start : start + 5]) == sorted(PROMPTS) for start in (0, 5, 10))
    assert drawn[3] == draw_prompts(PROMPTS, 3, 3, seed=0)
    assert len(draw_prompts(PROMPTS, 12, 0, seed=0)) == 12


def test_same_pictures_in_any_batch_size(policy):
    schedule = make_schedule(ddim_scheduler(policy.scheduler), 3, 1.0)
    noise = keyed_noise(0, 0, range(4), (4, *policy.latent_shape))
    prompts = PROMPTS[:4]
    whole = sample(policy, policy.network, prompts, noise, schedule, (0, 1))
    halves = [
        sample(policy, policy.network, prompts[part], noise[part], schedule, (0, 1))
        for part in (slice(0, 2), slice(2, 4))
    ]
    # The noise is the same to the bit; a network's output differs in the last bits with the size of its batch.
    torch.testing.assert_close(
        whole.final_latents, torch.cat([half.final_latents for half in halves]), rtol=1e-4, atol=1e-4
    )
    assert whole.log_probs.shape == (2, 4, 8, 8)
    assert whole.steps.tolist() == [0, 1]


def test_trajectory_is_what_diffusers_samples(policy, pipeline_folder):
    """The same initial latent and noise through DDIMScheduler.step."""
    scheduler = ddim_scheduler(policy.scheduler)
    schedule = make_schedule(scheduler, 4, 1.0)
    noise = keyed_noise(0, 0, range(2), (5, *policy.latent_shape))
    trajectory = sample(policy, policy.network, PROMPTS[:2], noise, schedule, (1,), guidance_scale=2.0)
    embeds, nothing = policy.encode(PROMPTS[:2]).embeds, policy.encode(["", ""]).embeds
    latents = noise[:, 0]
    with torch.no_grad():
        for step, timestep in enumerate(scheduler.timesteps):
            conditional = policy.network(latents, timestep, encoder_hidden_states=embeds).sample
            unconditional = policy.network(latents, timestep, encoder_hidden_states=nothing).sample
            output = unconditional + 2.0 * (conditional - unconditional)
            if step == 1:
                torch.testing.assert_close(trajectory.latents[0], latents, rtol=1e-4, atol=1e-4)
            latents = scheduler.step(output, timestep, latents, eta=1.0, variance_noise=noise[:, step + 1]).prev_sample
    torch.testing.assert_close(trajectory.final_latents, latents, rtol=1e-4, atol=1e-4)


def test_diversity_and_edges():
    images = torch.zeros(4, 3, 8, 8)
    images[1] = 0.5
    images[3, :, :, 4:] = 1.0
    torch.testing.assert_close(diversity(images, 2), torch.tensor([0.5, math.sqrt(0.5)]))
    assert diversity(images, 1).isnan().all()
    assert edge_energy(images).tolist() == pytest.approx([0, 0, 0, 1 / 7])


class Returns:
    differentiable = False

    def __init__(self, make):
        self.make = make

    def __call__(self, images, prompts):
        return self.make(images.mean(dim=(1, 2, 3)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda mean: Reward(total=mean, terms={"sharp": mean / 0}), "term `sharp` is .*'a blue square'"),
        (lambda mean: Reward(total=mean * torch.tensor([1, float("nan")])), "total is nan for the prompt 'a blue"),
        (lambda mean: Reward(total=mean, penalties={"map": -torch.ones(2, 4, 4)}), "`map` is negative"),
        (lambda mean: Reward(total=mean, penalties={"map": torch.ones(4, 4)}), r"`map` has shape \(4, 4\)"),
        (lambda mean: Reward(total=mean[:1]), "total has shape"),
        (lambda mean: Reward(total=mean, word_penalties=[]), "word penalties for 0"),
    ],
)
def test_a_reward_that_is_no_number_is_refused(make, message):
    images = torch.zeros(2, 3, 4, 4)
    images[0] = 0.5
    if "sharp" in message:
        images[0] = 0  # 0 / 0
        message = message.replace("'a blue square'", "'a red circle'")
    with pytest.raises(RewardError, match=message):
        score(Returns(make), images, PROMPTS[:2])


def test_scores_do_not_depend_on_the_batch():
    from tests.rl.toy_rewards import Redness

    images = torch.rand(5, 3, 8, 8)
    whole, parts = score(Redness(), images, PROMPTS), score(Redness(), images, PROMPTS, batch_size=2)
    assert torch.equal(whole.objective, parts.objective)
    assert torch.equal(whole.penalties["implausibility"], parts.penalties["implausibility"])
    assert [len(words) for words in parts.word_penalties] == [len(prompt.split()) for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("share", "places"),
    [("none", []), ("before", [0, 1, 2]), ("around", [0, 1, 2, 6])],
    ids=["none", "before", "around"],
)
def test_what_a_group_shares_of_its_noise(policy, share, places):
    """Of seven draws (a latent's, six steps'), with steps 2 and 4 trained, those of steps 2, 3 and 4 differ."""
    schedule = make_schedule(ddim_scheduler(policy.scheduler), 6, 1.0)
    assert shared_places(share, [2, 4], len(schedule)) == places
    noise = rollout_noise(policy, schedule, 5, 0, range(6), 3, places)
    plain = rollout_noise(policy, schedule, 5, 0, range(6))
    for place in range(7):
        same = torch.stack([(noise[a, place] == noise[b, place]).all() for a in range(6) for b in range(6)]).view(6, 6)
        group = torch.arange(6) // 3
        assert torch.equal(same, group[:, None] == group if place in places else torch.eye(6, dtype=torch.bool))
        if place not in places:
            assert torch.equal(noise[:, place], plain[:, place])
    parts = [rollout_noise(policy, schedule, 5, 0, rows, 3, places) for rows in ([0, 1, 2, 3], [4, 5])]
    assert torch.equal(torch.cat(parts), noise)  # whatever the batches, and so the ranks
