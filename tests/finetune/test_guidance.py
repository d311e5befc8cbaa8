"""The formula of guidance against what schedulers do, and against a distribution whose guided form is known."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers import DDPMScheduler, PNDMScheduler, StableDiffusionXLPipeline
from torch import nn

from finetune.guidance import (
    SCHEDULERS,
    Guidance,
    Level,
    as_output,
    check_scheduler,
    clean_and_noise,
    levels,
    make_scheduler,
    noised_back,
)
from finetune.guidance_callback import GuidanceCallback, following_step
from finetune.guided_sampling import guided_path, reward_gradient, sample
from reward.feedback import Reward, RewardError
from rl.keyed import keyed_generator
from rl.pipelines import load_pipeline
from tests.rl.conftest import PROMPTS, make_pipeline, make_xl_pipeline
from tests.rl.toy_rewards import Plain, Redness

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
SETTINGS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def make(name, prediction_type="epsilon", steps=7, **changes):
    changes |= {"clip_sample": False} if name == "ddim" else {}
    scheduler = SCHEDULERS[name](prediction_type=prediction_type, **SETTINGS, **changes)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_pipeline(tmp_path_factory.mktemp("guide_sd"))


@pytest.fixture
def pipeline(folder):
    pipeline = load_pipeline(folder, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generators(count=2, seed=0):
    return [keyed_generator(seed, "test", index) for index in range(count)]


# ---- Settings ----


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0, 1, 1, 1, 0]), ("falling", [0, 1, 2 / 3, 1 / 3, 0]), ("rising", [0, 1 / 3, 2 / 3, 1, 0])],
)
def test_the_scale_over_the_window(schedule, expected):
    guidance = Guidance(2.0, schedule=schedule, first=1, last=4)
    assert guidance.scales(5) == pytest.approx([2 * value for value in expected])


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"scale": -0.1}, "scale is -0.1; it must not be negative"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"norm": "l2"}, "norm is 'l2'; it must be one of raw, unit"),
        ({"schedule": "cosine"}, "schedule is 'cosine'"),
        ({"max_norm": 0.0}, "max_norm is 0.0; it must be above 0"),
        ({"recurrence": -1}, "recurrence is -1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        Guidance(**{"scale": 1.0, **settings})


@pytest.mark.parametrize(("first", "last"), [(0, 6), (3, 3), (-1, 2), (5, None)])
def test_a_window_outside_the_steps_is_refused(first, last):
    with pytest.raises(ValueError, match=r"does not lie within the 5 steps 0:5"):
        Guidance(1.0, first=first, last=last).scales(5)


def test_a_push_of_unit_norm_does_not_depend_on_the_rewards_units():
    gradient = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    push = Guidance(0.1).push(gradient, Level(0.6, 0.8), 0.1)
    assert push.square().mean(dim=(1, 2, 3)).sqrt().tolist() == pytest.approx([0.08, 0.08])
    assert torch.allclose(push, Guidance(0.1).push(1e-6 * gradient, Level(0.6, 0.8), 0.1))
    assert torch.allclose(push, Guidance(0.1).push(gradient, Level(1.0, 0.8 / 0.6), 0.1))  # Euler's x is x / alpha
    assert (Guidance(0.1).push(torch.zeros_like(gradient), Level(0.6, 0.8), 0.1) == 0).all()


def test_a_raw_push_is_classifier_guidance_and_is_limited_picture_by_picture():
    gradient = torch.stack([torch.full((4, 3, 3), 1.0), torch.full((4, 3, 3), 10.0)])
    push = Guidance(0.5, norm="raw").push(gradient, Level(0.6, 0.8), 0.5)
    assert torch.allclose(push, 0.4 * gradient)
    limited = Guidance(0.5, norm="raw", max_norm=1.0).push(gradient, Level(0.6, 0.8), 0.5)
    assert limited[:, 0, 0, 0].tolist() == pytest.approx([0.4, 1.0])


# ---- Noise levels ----


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_levels_are_those_at_which_the_scheduler_adds_noise(name, spacing):
    scheduler = make(name, timestep_spacing=spacing)
    path = levels(scheduler)
    assert len(path) == 7
    clean, noise = torch.randn(2, 1, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    for (level, _), timestep in zip(path, scheduler.timesteps, strict=True):
        noisy = scheduler.add_noise(clean, noise, timestep.reshape(1))
        assert torch.allclose(noisy, level.alpha * clean + level.sigma * noise, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp"])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_a_step_told_the_truth_goes_from_level_to_level(name, prediction_type, spacing):
    """Holds `levels`, `as_output` and `clean_and_noise` to what the scheduler itself makes of an output."""
    scheduler = make(name, prediction_type, timestep_spacing=spacing)
    path = levels(scheduler)
    clean, noise = torch.randn(2, 1, 4, 3, 3, generator=torch.Generator().manual_seed(2))
    for step, timestep in enumerate(scheduler.timesteps):
        start, end = path[step]
        noisy = start.alpha * clean + start.sigma * noise
        scheduler.scale_model_input(noisy, timestep)
        output = as_output(noise, noisy, start, prediction_type)
        for found, truth in zip(clean_and_noise(output, noisy, start, prediction_type), (clean, noise), strict=True):
            assert torch.allclose(found, truth, atol=2e-3)
        found = scheduler.step(output, timestep, noisy, return_dict=False)[0]
        expected = end.alpha * clean + end.sigma * noise
        assert torch.allclose(found, expected, atol=5e-3), (step, float((found - expected).abs().max()))


def test_noised_back_has_the_starts_noise():
    clean = torch.full((1, 1, 200, 200), 3.0)
    source = torch.Generator().manual_seed(0)
    for start, end in (
        (Level(0.6, 0.8), Level(0.8, 0.6)),
        (Level(1.0, 5.0), Level(1.0, 2.0)),
        (Level(0.6, 0.8), Level(1, 0)),
    ):
        first, second = torch.randn(2, 1, 1, 200, 200, generator=source)
        back = noised_back(end.alpha * clean + end.sigma * first, end, start, second)
        assert float(back.mean()) == pytest.approx(3 * start.alpha, abs=0.06)
        assert float(back.std()) == pytest.approx(start.sigma, rel=0.02)


def test_a_scheduler_that_cannot_be_guided_is_named_with_those_that_can():
    with pytest.raises(ValueError, match=r"PNDMScheduler cannot be guided; set `scheduler` to one of ddim .*dpmpp"):
        check_scheduler(PNDMScheduler())
    with pytest.raises(ValueError, match="clip_sample cannot be guided"):
        check_scheduler(SCHEDULERS["ddim"](clip_sample=True))
    with pytest.raises(ValueError, match="prediction_type 'flow_prediction' cannot be guided"):
        check_scheduler(make("dpmpp", "flow_prediction"))
    with pytest.raises(ValueError, match=r"EulerAncestral.* 'sample' cannot be guided; what can is epsilon, v_pred"):
        check_scheduler(make("euler_a", "sample"))
    assert isinstance(make_scheduler(DDPMScheduler(clip_sample=True), "euler"), SCHEDULERS["euler"])  # it never clips
    assert isinstance(make_scheduler(PNDMScheduler(), "ddim"), SCHEDULERS["ddim"])


def test_a_window_that_starts_in_pure_noise_is_refused():
    scheduler = make("ddim", "v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(ValueError, match=r"step 0 starts in pure noise .* begin at 1"):
        guided_path(scheduler, Guidance(1.0))
    assert guided_path(scheduler, Guidance(1.0, first=1))[1] == [0, 1, 1, 1, 1, 1, 1]


# ---- A distribution whose guided form is known ----

MEAN, STD, PULL, SCALE = 0.4, 0.7, 8.0, 2.0


class Gaussian(nn.Module):
    """The exact network of clean latents N(MEAN, STD^2): it predicts the noise."""

    def __init__(self, scheduler, config):
        super().__init__()
        self.scheduler, self.config, self.weight = scheduler, config, nn.Parameter(torch.zeros(1))

    dtype, device = torch.float32, torch.device("cpu")

    def forward(self, latents, timestep, return_dict=True, **conditioning):
        place = int((self.scheduler.timesteps == timestep).nonzero()[0])
        alpha, sigma = levels(self.scheduler)[place][0]
        r = (alpha**2 + sigma**2) ** 0.5
        if not isinstance(self.scheduler, SCHEDULERS["dpmpp"] | SCHEDULERS["ddim"]):
            latents = latents * r  # Euler hands over x / r
        noise = sigma * (latents - alpha * MEAN) / ((alpha * STD) ** 2 + sigma**2)
        return SimpleNamespace(sample=noise) if return_dict else (noise,)


class Pull:
    """Linear in the picture, and so in the latent: PULL times its mean."""

    differentiable = True

    def __call__(self, images, prompts):
        return Reward(total=PULL * images.sum(dim=(1, 2, 3)))


class Faint:
    """A VAE whose pictures are the latent's first three channels, so faint that none is clipped."""

    config = SimpleNamespace(scaling_factor=1.0, get=lambda name: None)
    dtype = torch.float32

    def parameters(self):
        return iter(())

    def decode(self, latents, return_dict=True, generator=None):
        pictures = 0.05 * latents[:, :3]
        return SimpleNamespace(sample=pictures) if return_dict else (pictures,)


@pytest.fixture
def gaussian(pipeline):
    def with_scheduler(name, steps):
        pipeline.scheduler = make(name, steps=steps, timestep_spacing="trailing")
        pipeline.unet = Gaussian(pipeline.scheduler, pipeline.unet.config)
        pipeline.vae = Faint()
        return pipeline

    return with_scheduler


def latents_of(images):
    return (images - 0.5) / 0.025


SHIFT = SCALE * PULL * 0.025 * STD**2
"""Tilting N(m, s^2) by exp(a x) gives N(m + a s^2, s^2), and for a linear reward and Gaussian data universal guidance
is exact."""


def moved_by(scheduler):
    """How far guidance moves each picture: `SHIFT`, less what would have had to be in the noise that sampling starts
    from, as the schedule does not end in pure noise: the path from there keeps all distances in proportion."""
    alpha, sigma = levels(scheduler)[0][0]
    return SHIFT * (1 - alpha * STD / ((alpha * STD) ** 2 + sigma**2) ** 0.5)


@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp"])
def test_guidance_of_a_gaussian_by_a_linear_reward_samples_the_tilted_gaussian(gaussian, name):
    pipeline = gaussian(name, 100)
    free = latents_of(sample(pipeline, PROMPTS[:2], generators(), 100))
    guided = latents_of(sample(pipeline, PROMPTS[:2], generators(), 100, Pull(), Guidance(SCALE, norm="raw")))
    assert guided - free == pytest.approx(torch.full_like(free, moved_by(pipeline.scheduler)), rel=0.01)


@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp"])
def test_the_callback_comes_to_the_same(gaussian, name):
    pipeline = gaussian(name, 100)
    callback = GuidanceCallback(Pull(), PROMPTS[:2], Guidance(SCALE, norm="raw"))

    def call(**arguments):
        return latents_of(
            pipeline(PROMPTS[:2], num_inference_steps=100, guidance_scale=1.0, generator=generators(),
                     output_type="pt", **arguments).images
        )  # fmt: skip

    inputs = callback.tensor_inputs(pipeline)
    moved = call(callback_on_step_end=callback, callback_on_step_end_tensor_inputs=inputs) - call()
    assert moved == pytest.approx(torch.full_like(moved, moved_by(pipeline.scheduler)), rel=0.03)


def test_recurrence_of_an_exact_model_keeps_its_distribution(gaussian):
    pipeline = gaussian("ddim", 100)
    guidance = Guidance(SCALE, norm="raw", recurrence=1)
    prompts = PROMPTS[:1] * 40
    drawn = latents_of(sample(pipeline, prompts, generators(40), 100, Pull(), guidance))
    assert float(drawn.mean()) == pytest.approx(MEAN + SHIFT, abs=0.04)
    assert float(drawn.std()) == pytest.approx(STD, abs=0.05)


# ---- The pipelines' own loop ----


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_without_guidance_it_draws_the_pipelines_pictures(pipeline, name, guidance_scale):
    pipeline.scheduler = make_scheduler(pipeline.scheduler, name)
    arguments = {"eta": 1.0, "guidance_scale": guidance_scale}
    ours = sample(pipeline, PROMPTS[:2], generators(), 4, **arguments)
    theirs = pipeline(PROMPTS[:2], num_inference_steps=4, generator=generators(), output_type="pt", **arguments).images
    assert torch.allclose(ours, theirs, atol=1e-5)
    still = sample(pipeline, PROMPTS[:2], generators(), 4, Redness(), Guidance(0.0), **arguments)
    assert torch.equal(still, ours)


def test_xl_with_negative_prompt(tmp_path):
    pipeline = load_pipeline(make_xl_pipeline(tmp_path), torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"guidance_scale": 3.0, "negative_prompt": "blue"}
    ours = sample(pipeline, PROMPTS[:2], generators(), 3, **arguments)
    arguments["negative_prompt"] = ["blue"] * 2
    theirs = pipeline(PROMPTS[:2], num_inference_steps=3, generator=generators(), output_type="pt", **arguments).images
    assert torch.allclose(ours, theirs, atol=1e-5)
    guided = sample(pipeline, PROMPTS[:2], generators(), 3, Redness(), Guidance(0.3), guidance_scale=3.0)
    assert score_of(guided) > score_of(sample(pipeline, PROMPTS[:2], generators(), 3, guidance_scale=3.0))
    callback = GuidanceCallback(Redness(), PROMPTS[:2], Guidance(0.3))
    inputs = callback.tensor_inputs(pipeline)
    assert inputs == ["latents", "prompt_embeds", "add_text_embeds", "add_time_ids"]

    def call(**arguments):
        return pipeline(
            PROMPTS[:2], num_inference_steps=3, generator=generators(), output_type="pt", guidance_scale=3.0,
            **arguments,
        ).images  # fmt: skip

    called = call(callback_on_step_end=callback, callback_on_step_end_tensor_inputs=inputs)
    assert not torch.allclose(called, guided, atol=1e-3)
    assert score_of(called) > score_of(call()) + 1e-4


def test_xl_whose_vae_overflows_in_float16_is_guided_in_float32(tmp_path):
    """Pipelines that others load keep such a VAE in float16, and decode in float32."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        make_xl_pipeline(tmp_path), dtype=torch.float16, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        pipeline.vae.decoder.conv_in.weight.mul_(3e4)
    callback = GuidanceCallback(Redness(), PROMPTS[:1], Guidance(0.1))
    latents = pipeline(
        PROMPTS[:1], num_inference_steps=2, guidance_scale=1.0, generator=generators(1), output_type="latent",
        callback_on_step_end=callback, callback_on_step_end_tensor_inputs=callback.tensor_inputs(pipeline),
    ).images  # fmt: skip
    assert latents.isfinite().all()
    assert pipeline.vae.dtype == torch.float16
    assert sample(pipeline, PROMPTS[:1], generators(1), 2, Redness(), Guidance(0.1)).isfinite().all()
    assert pipeline.vae.dtype == torch.float16


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_a_network_that_is_taken_off_the_gpu_cannot_be_gone_through(pipeline, offload):
    if offload == "model":
        _, hook = cpu_offload_with_hook(pipeline.unet, "cpu")
        assert hook
    else:
        add_hook_to_module(pipeline.unet, AlignDevicesHook("cpu", offload=True))
    tensors = {"latents": torch.zeros(1, 4, 8, 8)}
    callback = GuidanceCallback(Redness(), PROMPTS[:1], Guidance(0.1))
    with pytest.raises(ValueError, match="through_network=False"):
        callback(pipeline, 0, torch.tensor(500), tensors)


def score_of(images):
    return float(Redness()(images, PROMPTS[: len(images)]).objective.mean())


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("through_network", [True, False])
def test_guidance_climbs_the_reward(pipeline, name, through_network):
    pipeline.scheduler = make_scheduler(pipeline.scheduler, name)
    for recurrence in (0, 2):
        free, guided = (
            sample(
                pipeline, PROMPTS[:2], generators(), 4, Redness(),
                Guidance(scale, recurrence=recurrence, through_network=through_network),
            )
            for scale in (1e-9, 0.1)
        )  # fmt: skip
        assert score_of(free) + 0.003 < score_of(guided)


def test_a_step_outside_the_window_is_not_guided(pipeline):
    calls = Redness()
    sample(pipeline, PROMPTS[:2], generators(), 5, calls, Guidance(0.1, first=1, last=3, recurrence=2))
    assert calls.calls == 2 * 3


def test_guidance_does_not_depend_on_the_batch(pipeline):
    both = sample(pipeline, PROMPTS[:2], generators(), 3, Redness(), Guidance(0.2, recurrence=1), eta=1.0)
    alone = sample(pipeline, PROMPTS[1:2], generators()[1:], 3, Redness(), Guidance(0.2, recurrence=1), eta=1.0)
    assert torch.allclose(both[1:], alone, atol=1e-4)


@pytest.mark.parametrize("weight", [torch.ones(()), torch.ones((), requires_grad=True)])
def test_a_reward_without_gradient_is_found_out(pipeline, weight):
    """Also one with a gradient into a weight of its own."""

    def detached(images, prompts):
        return Reward(weight * images.detach().mean((1, 2, 3)))

    with pytest.raises(RewardError, match="does not depend on the pictures by operations that have a gradient"):
        sample(pipeline, PROMPTS[:1], generators(1), 2, detached, Guidance(1))


def test_a_gradient_that_is_not_finite_is_no_silent_zero(pipeline):
    def rootless(images, prompts):
        value = images.mean((1, 2, 3))
        return Reward(value + (value - value.detach()).sqrt())  # finite, with an infinite slope

    with pytest.raises(RewardError, match=f"the gradient of the reward by the picture of {PROMPTS[1]!r} is not finite"):
        sample(pipeline, PROMPTS[1:2], generators(1), 2, rootless, Guidance(0.1))


@pytest.mark.parametrize("slope", [1.0, 2.0**20, 2.0**30])
def test_small_gradients_survive_float16_and_large_ones_do_not_overflow(slope):
    """In the backward pass float16, which ends at 2^-24 and 2^16, holds the slope times 2^-15, then times 2^-25."""
    latents = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))

    def objective(clean):
        return ((clean.half() * 2.0**-10).float() * slope * 2.0**-15).sum((1, 2, 3))

    output, gradient = reward_gradient(
        torch.zeros_like, objective, latents, Level(1.0, 0.0), "epsilon", ["a", "b"], through_network=False
    )
    assert torch.equal(output, torch.zeros_like(latents))
    torch.testing.assert_close(gradient, torch.full_like(latents, slope * 2.0**-25))


# ---- The callback ----


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("start", [0, 20])
def test_the_step_behind_is_found_where_a_timestep_stands_twice(name, start):
    karras = {} if name in ("ddim", "euler_a") else {"use_karras_sigmas": True}
    scheduler = SCHEDULERS[name](beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **karras)
    scheduler.set_timesteps(50)
    if name == "dpmpp":
        assert len(set(scheduler.timesteps.tolist())) < 50
    if start and name != "ddim":
        scheduler.set_begin_index(start)  # as image to image does
    latents = torch.zeros(1, 1, 2, 2)
    for place, timestep in enumerate(scheduler.timesteps[start:], start):
        scheduler.step(latents, timestep, latents)
        assert following_step(scheduler, timestep) == place + 1


def test_the_callback_refuses_what_it_cannot_do(pipeline):
    with pytest.raises(ValueError, match="a step cannot be taken again from a callback"):
        GuidanceCallback(Redness(), PROMPTS[:1], Guidance(0.1, recurrence=1))
    with pytest.raises(ValueError, match="the reward is not differentiable"):
        GuidanceCallback(Plain(), PROMPTS[:1], Guidance(0.1))
    callback = GuidanceCallback(Redness(), PROMPTS[:1], Guidance(0.1))
    with pytest.raises(ValueError, match="SimpleNamespace cannot be guided by a callback"):
        callback.tensor_inputs(SimpleNamespace())
    inpainting = SimpleNamespace(
        unet=SimpleNamespace(config=SimpleNamespace(in_channels=9, out_channels=4)),
        _callback_tensor_inputs=["latents", "prompt_embeds"],
    )
    adapted = SimpleNamespace(
        unet=SimpleNamespace(
            config=SimpleNamespace(
                in_channels=4, out_channels=4, time_cond_proj_dim=None, encoder_hid_dim_type="ip_image_proj"
            )
        ),
        _callback_tensor_inputs=["latents", "prompt_embeds"],
    )
    with pytest.raises(ValueError, match=r"given more than the prompt .ip_image_proj, as by an IP-Adapter"):
        callback.tensor_inputs(adapted)
    with pytest.raises(ValueError, match="takes 9 channels, of which a callback sees the latent only"):
        callback.tensor_inputs(inpainting)
    with pytest.raises(ValueError, match="2 pictures are drawn, but the callback has 1 prompts"):
        pipeline(
            PROMPTS[:2], num_inference_steps=3, callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=callback.tensor_inputs(pipeline),
        )  # fmt: skip


def test_the_callback_keeps_nothing_for_gradients_of_weights(pipeline):
    """Those of a pipeline that was just loaded require them; they are frozen for the call, and given back."""

    def kept(reward):
        callback, sizes = GuidanceCallback(reward, PROMPTS[:1], Guidance(0.1)), []
        with torch.autograd.graph.saved_tensors_hooks(lambda one: sizes.append(one.numel()) or one, lambda one: one):
            pipeline(
                PROMPTS[:1], num_inference_steps=2, generator=generators(1), guidance_scale=1.0,
                callback_on_step_end=callback, callback_on_step_end_tensor_inputs=callback.tensor_inputs(pipeline),
            )  # fmt: skip
        return sum(sizes)

    def require(value):
        return [part.requires_grad_(value) for part in (pipeline.unet, pipeline.vae)]

    require(False)
    frozen = kept(Redness())
    parts = require(True)
    assert kept(Redness()) == frozen > 0
    assert all(weight.requires_grad for part in parts for weight in part.parameters())
    with pytest.raises(RewardError):
        kept(Redness(nan_after=0))
    assert all(weight.requires_grad for part in parts for weight in part.parameters())
