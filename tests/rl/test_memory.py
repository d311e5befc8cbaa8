"""What saves memory or time, and changes no picture."""

import functools
from contextlib import contextmanager
from types import MappingProxyType, SimpleNamespace

import pytest
import torch

import run_ddpo
from finetune.run import place_reward
from rl.memory import MemorySettings, OffloadedReward, borrowed
from rl.policy import StableDiffusionPolicy
from tests.rl.command import command
from tests.rl.conftest import PROMPTS
from tests.rl.toy_rewards import Plain, Redness

CPU, DEVICE = torch.device("cpu"), torch.device("meta")


def load(folder, **memory):
    resolution = memory.pop("resolution", None)
    settings = {"lora_rank": 2, "seed": 5, "lora_target_modules": ["to_q"]}
    return StableDiffusionPolicy.load(folder, resolution=resolution, memory=MemorySettings(**memory), **settings)


def latents_of(policy, count=3):
    return torch.randn(count, *policy.latent_shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("setting", ["vae_slicing", "vae_tiling"])
def test_decoding_in_pieces_gives_the_same_pictures(pipeline_folder, setting):
    """Tiles are at least as large as the VAE's own pictures, which these are."""
    whole, pieces = load(pipeline_folder), load(pipeline_folder, **{setting: True})
    assert getattr(pieces.pipeline.vae, f"use_{setting[4:]}")
    torch.testing.assert_close(pieces.decode(latents_of(pieces)), whole.decode(latents_of(whole)), rtol=0, atol=1e-6)


def test_large_pictures_are_decoded_in_tiles(pipeline_folder):
    """Of 16 pixels, the last 4 of which fade into the next tile."""
    whole, tiles = load(pipeline_folder), load(pipeline_folder, resolution=32, vae_tiling=True)
    latents = latents_of(tiles)
    pictures, first = tiles.decode(latents), whole.decode(latents[..., :8, :8])
    assert pictures.shape == (3, 3, 32, 32)
    torch.testing.assert_close(pictures[..., :12, :12], first[..., :12, :12], rtol=0, atol=1e-6)


class Part:
    """A module as far as moving it goes."""

    def __init__(self, device):
        self.device, self.moves = device, []

    def parameters(self):
        yield SimpleNamespace(device=self.device)

    def to(self, device):
        self.device = torch.device(device)
        self.moves.append(self.device)


def test_borrowed_parts_go_back_whatever_happens():
    away, there = Part(CPU), Part(DEVICE)

    def fails():
        with borrowed([away, there], DEVICE):
            assert away.device == there.device == DEVICE
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        fails()
    assert away.moves == [DEVICE, CPU]
    assert there.moves == []


def test_offloaded_parts_stay_where_they_are(pipeline_folder, xl_folder):
    """The device is torch's one without memory."""
    policy = load(xl_folder, offload=True).to(DEVICE)
    pipeline = policy.pipeline
    assert policy.device == DEVICE
    assert {pipeline.vae.device, pipeline.text_encoder.device, pipeline.text_encoder_2.device} == {CPU}
    assert load(pipeline_folder).to(DEVICE).pipeline.vae.device == DEVICE


def test_text_encoder_and_vae_work_where_they_are_borrowed(pipeline_folder, monkeypatch):
    there = []

    @contextmanager
    def borrow(modules, device):
        there.extend(modules)
        yield
        there.clear()

    monkeypatch.setattr("rl.policy.borrowed", borrow)
    policy, asked = load(pipeline_folder, offload=True), []

    def noting(part, name):
        work = getattr(part, name)

        def call(*args, **kwargs):
            assert part in there, f"{name} of a part that is elsewhere"
            asked.append(name)
            return work(*args, **kwargs)

        monkeypatch.setattr(part, name, call)

    noting(policy.pipeline.text_encoder, "forward")
    noting(policy.pipeline.vae, "decode")
    noting(policy.pipeline.vae, "encode")
    policy.encode(PROMPTS[:2])
    images = policy.decode(latents_of(policy, 2))
    policy.encode_images(images)
    assert set(asked) == {"forward", "decode", "encode"}


def test_the_command_places_all_its_rewards(config, monkeypatch):
    placed = []
    monkeypatch.setattr(run_ddpo, "place_reward", lambda reward, args: placed.append(reward) or reward)
    assert command("--config", config, "--dry_run", "true") == 0
    assert {type(reward) for reward in placed} == {Redness, Plain}


def test_offloaded_reward_is_on_the_device_while_it_is_asked():
    class Placed(Part, Plain):
        def __call__(self, images, prompts):
            assert self.device == DEVICE
            return super().__call__(images, prompts)

    reward = Placed(DEVICE)
    offloaded = OffloadedReward(reward, DEVICE)
    assert reward.device == CPU
    images = torch.rand(2, 3, 4, 4)
    assert torch.equal(offloaded(images, PROMPTS[:2]).total, Plain()(images, PROMPTS[:2]).total)
    assert reward.device == CPU
    assert offloaded.differentiable is False


def test_offloaded_reward_shows_what_it_sees_and_its_ranges():
    """Or monitors that need them would be off without a word."""

    class Seeing(Part, Plain):
        ranges = MappingProxyType({"plausibility": (0.0, 1.0)})

        def features(self, images):
            assert self.device == DEVICE
            return images.flatten(1)

    reward = Seeing(DEVICE)
    offloaded = OffloadedReward(reward, DEVICE)
    images = torch.rand(2, 3, 4, 4)
    assert torch.equal(offloaded.features(images), images.flatten(1))
    assert offloaded.ranges is Seeing.ranges
    assert reward.device == CPU
    blind = OffloadedReward(type("Blind", (Part, Plain), {})(CPU), DEVICE)
    assert not hasattr(blind, "features")
    assert not hasattr(blind, "ranges")


def test_where_a_reward_is_put():
    reward = Part(CPU)
    assert place_reward(reward, SimpleNamespace(offload=False, device=DEVICE)) is reward
    assert reward.device == DEVICE
    assert place_reward(Part(CPU), SimpleNamespace(offload=True, device=CPU)).device == CPU
    reward.differentiable = False
    assert isinstance(place_reward(reward, SimpleNamespace(offload=True, device=DEVICE)), OffloadedReward)
    plain = Plain()
    assert place_reward(plain, SimpleNamespace(offload=True, device=DEVICE)) is plain


@pytest.mark.filterwarnings("ignore")  # of what torch's own compiler does
def test_compiled_network_is_the_same(pipeline_folder, monkeypatch):
    """Values, gradients, and the weights' names. All that is ours is in what dynamo captures, forward and backward: the
    C++ that torch would make of it takes long to compile, and is left out."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    results = []
    for compiled in (False, True):
        policy = load(pipeline_folder, torch_compile_unet=compiled)
        for parameter in policy.network.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1
        latents, timesteps = latents_of(policy, 2), torch.tensor([500, 20])
        output = policy.predict(policy.network, latents, timesteps, policy.encode(PROMPTS[:2]))
        output.square().mean().backward()
        gradients = [parameter.grad for parameter in policy.network.parameters() if parameter.requires_grad]
        with torch.no_grad(), policy.folded():
            folded = policy.predict(policy.network, latents, timesteps, policy.encode(PROMPTS[:2]))
        results.append([output.detach(), folded, *gradients])
        names = policy.network.state_dict().keys()
        assert not any("_orig_mod" in name for name in names)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-5)
    torch._dynamo.reset()
