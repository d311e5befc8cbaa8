"""Gradients through sampling, on a tiny Stable Diffusion in float64."""

from types import SimpleNamespace
from weakref import ref

import pytest
import torch
from diffusers import DDIMScheduler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune.backprop import Reach, Sampler, choose_reach, noise_again
from rl.keyed import keyed_noise
from rl.policy import StableDiffusionPolicy
from rl.rollout import sample
from rl.sde import Schedule, ddim_scheduler, make_schedule
from tests.rl.conftest import PROMPTS, pipeline_folder  # noqa: F401
from tests.rl.test_adapter import load, trained
from tests.rl.test_lora_dropout import without_columns
from tests.rl.toy_rewards import Redness

STEPS, COUNT = 4, 2


@pytest.fixture
def policy(pipeline_folder):  # noqa: F811
    """With a LoRA that does something."""
    policy = StableDiffusionPolicy.load(pipeline_folder, seed=5, lora_rank=2, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for name, weight in policy.network.named_parameters():
        if "lora_B" in name:
            weight.data = 0.2 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    return policy


def schedule_of(policy, steps=STEPS, eta=0.7):
    return make_schedule(ddim_scheduler(policy.scheduler), steps, eta)


def noise_of(policy, steps=STEPS, name="test", count=COUNT):
    return keyed_noise(0, name, range(count), (steps + 1, *policy.latent_shape)).double()


def fresh_of(policy, draws):
    return keyed_noise(0, "again", range(COUNT), (draws - 1, *policy.latent_shape)).double()


def behind(schedule, first):
    """The steps from `first` on."""
    parts = (schedule.timesteps, schedule.alphas, schedule.next_alphas, schedule.stds)
    return Schedule(*[part[first:] for part in parts], schedule.prediction_type, schedule.clip_sample_range)


def weights_of(policy):
    return [weight for weight in policy.network.parameters() if weight.requires_grad]


def objective(policy, latents):
    count = len(latents)
    return Redness()(policy.decode(latents), (PROMPTS * count)[:count]).objective.mean()


def gradient(policy, drawn):
    return torch.autograd.grad(objective(policy, drawn.latents), weights_of(policy))


def finite_difference(policy, value, direction, epsilon=1e-5):
    """d value() / d epsilon along `direction` in the space of the trained weights, by central differences."""
    found = []
    for sign in (1, -1):
        for weight, change in zip(weights_of(policy), direction, strict=True):
            weight.data += sign * epsilon * change
        with torch.no_grad():
            found.append(float(value()))
        for weight, change in zip(weights_of(policy), direction, strict=True):
            weight.data -= sign * epsilon * change
    return (found[0] - found[1]) / (2 * epsilon)


def direction_of(policy):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(weight.shape, generator=generator, dtype=weight.dtype) for weight in weights_of(policy)]


@pytest.mark.parametrize(
    ("first", "guidance_scale", "recompute"),
    [(0, 1.0, True), (0, 1.0, False), (1, 3.0, True), (2, 1.0, True), (3, 1.0, True)],
)
def test_gradient_through_the_last_steps_is_that_of_finite_differences(policy, first, guidance_scale, recompute):
    """What comes before them is a constant: the sum that is differentiated starts at their first latent."""
    schedule, noise, prompts = schedule_of(policy), noise_of(policy), PROMPTS[:COUNT]
    sampler = Sampler(policy, policy.network, schedule, guidance_scale, recompute)
    drawn = sampler.draw(prompts, noise, Reach(first, STEPS - 1))
    direction = direction_of(policy)
    slope = sum((g * d).sum() for g, d in zip(gradient(policy, drawn), direction, strict=True))

    with torch.no_grad():
        start = noise[:, 0]
        if first:
            start = sampler.draw(prompts, noise, Reach(0, first - 1)).latents
    rest = torch.cat([start[:, None], noise[:, first + 1 :]], dim=1)
    late = Sampler(policy, policy.network, behind(schedule, first), guidance_scale)

    def value():
        return objective(policy, late.draw(prompts, rest, Reach(0, STEPS - 1 - first)).latents)

    assert abs(float(slope)) > 1e-4
    assert float(slope) == pytest.approx(finite_difference(policy, value, direction), rel=1e-5)


def test_gradient_of_several_noisings_is_that_of_finite_differences(policy):
    """Of one step from each of the places it is made from, which are constants."""
    schedule, noise, prompts = schedule_of(policy), noise_of(policy), PROMPTS[:COUNT]
    last, draws = STEPS - 1, 3
    fresh = fresh_of(policy, draws)
    sampler = Sampler(policy, policy.network, schedule)
    drawn = sampler.draw(prompts, noise, Reach(last, last, draws=draws), fresh)
    direction = direction_of(policy)
    slope = sum((g * d).sum() for g, d in zip(gradient(policy, drawn), direction, strict=True))

    with torch.no_grad():
        before = sampler.draw(prompts, noise, Reach(0, last - 1)).latents
        end = sampler.draw(prompts, noise, Reach(0, last)).latents
    starts = [before, *[noise_again(end, fresh[:, draw], last, schedule) for draw in range(draws - 1)]]
    starts = torch.stack([torch.cat(starts), torch.zeros(draws * COUNT, *policy.latent_shape)], dim=1)
    late = Sampler(policy, policy.network, behind(schedule, last))

    def value():
        return objective(policy, late.draw(prompts * draws, starts, Reach(0, 0)).latents)

    assert float(slope) == pytest.approx(finite_difference(policy, value, direction), rel=1e-5)


def test_gradient_of_an_estimated_picture_is_that_of_finite_differences(policy):
    """ReFL's: the clean picture that one late step predicts, from a latent that is a constant."""
    schedule, noise, prompts, step = schedule_of(policy), noise_of(policy), PROMPTS[:COUNT], STEPS - 2
    sampler, direction = Sampler(policy, policy.network, schedule), direction_of(policy)
    drawn = sampler.draw(prompts, noise, Reach(step, step, estimate=True))
    slope = sum((g * d).sum() for g, d in zip(gradient(policy, drawn), direction, strict=True))
    with torch.no_grad():
        start = sampler.draw(prompts, noise, Reach(0, step - 1)).latents
    late, rest = Sampler(policy, policy.network, behind(schedule, step)), torch.stack([start, noise[:, 1]], dim=1)

    def value():
        return objective(policy, late.draw(prompts, rest, Reach(0, 0, estimate=True)).latents)

    assert abs(float(slope)) > 1e-4
    assert float(slope) == pytest.approx(finite_difference(policy, value, direction), rel=1e-5)


def test_gradient_of_the_guards_distance_is_that_of_finite_differences(policy):
    """The latents at which both networks are asked move with the weights, and that counts."""
    schedule, noise, prompts = schedule_of(policy), noise_of(policy), PROMPTS[:COUNT]
    sampler, direction = Sampler(policy, policy.network, schedule), direction_of(policy)
    for name in ("noise_distance", "kl"):

        def value(name=name):
            return getattr(sampler.draw(prompts, noise, Reach(0, 2), measure=True, guard=True), name)

        found = torch.autograd.grad(value(), weights_of(policy), allow_unused=True)
        slope = sum((g * d).sum() for g, d in zip(found, direction, strict=True))
        assert float(slope) == pytest.approx(finite_difference(policy, value, direction), rel=1e-5)


def test_a_distance_that_guards_nothing_is_the_same_number_without_gradients(policy):
    schedule, noise, prompts = schedule_of(policy), noise_of(policy), PROMPTS[:COUNT]
    sampler, fresh = Sampler(policy, policy.network, schedule), fresh_of(policy, 2)
    for reach in (Reach(0, 2), Reach(2, 2, draws=2)):
        guarded = sampler.draw(prompts, noise, reach, fresh, measure=True, guard=True)
        measured = sampler.draw(prompts, noise, reach, fresh, measure=True)
        for name in ("noise_distance", "kl"):
            assert torch.equal(getattr(measured, name), getattr(guarded, name))
            assert getattr(guarded, name).requires_grad
            assert not getattr(measured, name).requires_grad
        assert torch.equal(measured.latents, guarded.latents)


def test_one_last_step_is_one_draw_of_the_last_step(policy):
    schedule, noise = schedule_of(policy), noise_of(policy)
    sampler, end = Sampler(policy, policy.network, schedule), STEPS - 1
    args = {"num_inference_steps": STEPS, "seed": 0}
    one = choose_reach(SimpleNamespace(variant="draft_k", backprop_steps=1, **args), STEPS, 0)
    other = choose_reach(SimpleNamespace(variant="draft_lv", lv_draws=1, **args), STEPS, 0)
    left, right = (sampler.draw(PROMPTS[:COUNT], noise, reach, fresh_of(policy, 1)) for reach in (one, other))
    assert torch.equal(left.latents, right.latents)
    one_step = gradient(policy, left)
    for mine, theirs in zip(one_step, gradient(policy, right), strict=True):
        assert torch.equal(mine, theirs)

    # A second draw whose noise is what the network itself predicts starts, and so ends, where the first one did.
    with torch.no_grad():
        start = sampler.draw(PROMPTS[:COUNT], noise, Reach(0, end - 1)).latents
        clean = sampler.draw(PROMPTS[:COUNT], noise, Reach(0, end)).latents
    alpha = schedule.alphas[end]
    predicted = (start - alpha.sqrt() * clean) / (1 - alpha).sqrt()
    twice = sampler.draw(PROMPTS[:COUNT], noise, Reach(end, end, draws=2), predicted[:, None])
    torch.testing.assert_close(twice.latents[COUNT:], twice.latents[:COUNT], rtol=0, atol=1e-6)
    for mine, theirs in zip(gradient(policy, twice), one_step, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


def test_pictures_are_those_that_are_sampled_without_gradients(policy):
    schedule, noise = schedule_of(policy), noise_of(policy)
    expected = sample(policy, policy.network, PROMPTS[:COUNT], noise, schedule).final_latents
    for first in (0, 2, 3):
        drawn = Sampler(policy, policy.network, schedule).draw(PROMPTS[:COUNT], noise, Reach(first, STEPS - 1))
        # Up to rounding: what is sampled without gradients has the LoRA folded into the weights.
        torch.testing.assert_close(drawn.latents.detach(), expected, rtol=1e-10, atol=1e-10)


def test_refl_rewards_what_a_step_estimates_as_diffusers_does(policy):
    schedule, noise, step = schedule_of(policy), noise_of(policy), 2
    sampler = Sampler(policy, policy.network, schedule)
    drawn = sampler.draw(PROMPTS[:COUNT], noise, Reach(step, step, estimate=True))
    scheduler = DDIMScheduler.from_config(policy.scheduler.config)
    scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        latents = sampler.draw(PROMPTS[:COUNT], noise, Reach(0, step - 1)).latents
        time = schedule.timesteps[step].expand(COUNT)
        output = policy.predict(policy.network, latents, time, policy.encode(PROMPTS[:COUNT]))
        expected = scheduler.step(output, int(time[0]), latents, eta=0.7).pred_original_sample
    torch.testing.assert_close(drawn.latents.detach(), expected, rtol=0, atol=1e-6)


def test_latents_are_noised_to_where_the_forward_process_has_them(policy):
    """To the variance of the noise schedule: of unit latents it stays one."""
    schedule = schedule_of(policy)
    latents = keyed_noise(0, "x", range(400), policy.latent_shape).double()
    noise = keyed_noise(0, "n", range(400), policy.latent_shape).double()
    noised = noise_again(latents, noise, STEPS - 1, schedule)
    alpha = schedule.alphas[-1].double()
    assert schedule.next_alphas[-1] == 1
    assert float(noised.var()) == pytest.approx(1, abs=0.03)
    assert float((noised * latents).mean()) == pytest.approx(float(alpha.sqrt()), abs=0.03)


def settings(**changes):
    args = {"seed": 3, "backprop_range": None, "refl_steps": None}
    return SimpleNamespace(**{**args, **changes})


def test_reaches():
    assert choose_reach(settings(variant="draft"), 10, 5) == Reach(0, 9)
    assert choose_reach(settings(variant="draft_k", backprop_steps=3), 10, 5) == Reach(7, 9)
    assert choose_reach(settings(variant="draft_lv", lv_draws=4), 10, 5) == Reach(9, 9, draws=4)
    some = [choose_reach(settings(variant="alignprop", backprop_range=[2, 4]), 10, update) for update in range(60)]
    assert {(reach.first, reach.last, reach.estimate) for reach in some} == {
        (8, 9, False),
        (7, 9, False),
        (6, 9, False),
    }
    any_of = [choose_reach(settings(variant="alignprop"), 10, update).steps for update in range(200)]
    assert set(any_of) == set(range(1, 11))
    late = [choose_reach(settings(variant="refl"), 10, update) for update in range(60)]
    assert {(reach.first, reach.last) for reach in late} == {(7, 7), (8, 8), (9, 9)}
    assert all(reach.estimate for reach in late)
    assert late[7] == choose_reach(settings(variant="refl"), 10, 7)  # keyed by the update


@torch.no_grad()
def test_every_draw_of_a_picture_is_that_of_a_policy_without_what_it_drops(pipeline_folder):  # noqa: F811
    """Up to the last step, and from it again with fresh noise."""
    keys, reach = [(0, place) for place in range(COUNT)], Reach(STEPS - 1, STEPS - 1, draws=3)
    policy = trained(load(pipeline_folder, dtype=torch.float64, lora_dropout=0.5))
    schedule, noise, fresh = schedule_of(policy), noise_of(policy), fresh_of(policy, 3)
    sampler = Sampler(policy, policy.network, schedule)
    drawn = sampler.draw(PROMPTS[:COUNT], noise, reach, fresh, dropout_keys=keys).latents.unflatten(0, (3, COUNT))
    for place, kept in enumerate(policy.trained.dropout.draw(keys)):
        other = without_columns(trained(load(pipeline_folder, dtype=torch.float64)), kept)
        rows = slice(place, place + 1)
        alone = Sampler(other, other.network, schedule).draw(PROMPTS[rows], noise[rows], reach, fresh[rows]).latents
        torch.testing.assert_close(drawn[:, place], alone)


class Peak(TorchDispatchMode):
    """The largest sum of bytes of tensors that are alive at once, of those made within it."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self._take_in(tensor.untyped_storage())
        return result

    def _take_in(self, storage):
        key = storage._cdata
        if key in self.alive or storage.nbytes() == 0:
            return
        size = storage.nbytes()
        self.alive[key] = ref(storage, lambda _: self._let_go(key, size))
        self.now += size
        self.most = max(self.most, self.now)

    def _let_go(self, key, size):
        del self.alive[key]
        self.now -= size


def peak_bytes(policy, steps, recompute):
    schedule, noise = schedule_of(policy, 10), noise_of(policy, 10, count=8)
    sampler = Sampler(policy, policy.network, schedule, recompute=recompute)
    policy.encode(PROMPTS[:1])
    with Peak() as peak:
        drawn = sampler.draw(PROMPTS[:1] * 8, noise, Reach(10 - steps, 9), measure=True)
        found = gradient(policy, drawn)
    assert all(part.abs().sum() > 0 for part in found)
    assert float(drawn.noise_distance) > 0
    return peak.most


def test_ten_steps_that_are_computed_again_need_little_more_memory_than_one(policy):
    one = peak_bytes(policy, 1, recompute=True)
    assert peak_bytes(policy, 10, recompute=True) <= 1.5 * one
    assert peak_bytes(policy, 10, recompute=False) > 3 * one  # so the measure does see what is kept
