"""What is trained, of every kind: plain diffusers loads what comes out, and draws the trainer's own pictures."""

import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from rl.adapter import LORA_WEIGHTS, AdapterSettings
from rl.keyed import keyed_noise
from rl.pipelines import load_pipeline
from rl.policy import StableDiffusionPolicy
from rl.rollout import sample
from rl.sde import ddim_scheduler, make_schedule
from tests.rl.conftest import PROMPTS

ATTENTION = {"lora_target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
KINDS = {
    "alpha": {"lora_alpha": 8.0},
    "rslora": {"use_rslora": True, "lora_alpha": 3.0},
    "dora": {"use_dora": True, "lora_alpha": 4.0},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal", **ATTENTION},
    "olora": {"init_lora_weights": "olora", **ATTENTION},
    "pissa": {"init_lora_weights": "pissa", "lora_alpha": 3.0, **ATTENTION},
    "pissa_rslora": {"init_lora_weights": "pissa_niter_4", "use_rslora": True, **ATTENTION},
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def load(folder, **changes):
    return StableDiffusionPolicy.load(folder, **{"lora_rank": 2, "seed": 5, **changes})


def trained(policy):
    """Give what is trained weights that show."""
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.network.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return policy


def latents_of(policy):
    schedule = make_schedule(ddim_scheduler(policy.scheduler), 3, eta=0.0)
    noise = keyed_noise(0, 0, range(2), (4, *policy.latent_shape))
    return sample(policy, policy.network, PROMPTS[:2], noise, schedule).final_latents


def latents_by_diffusers(pipe, policy):
    pipe.scheduler = ddim_scheduler(policy.scheduler)
    pipe.set_progress_bar_config(disable=True)
    noise = keyed_noise(0, 0, range(2), (4, *policy.latent_shape))
    return pipe(
        PROMPTS[:2], num_inference_steps=3, guidance_scale=1.0, latents=noise[:, 0], output_type="latent"
    ).images


def assert_close(left, right):
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


@kinds
def test_lora_of_every_kind_loads_in_plain_diffusers(pipeline_folder, tmp_path, kind):
    policy = load(pipeline_folder, **kind)
    base = latents_by_diffusers(load_pipeline(pipeline_folder, torch.float32), policy)
    assert_close(latents_of(policy), base)  # untrained, it changes nothing
    with trained(policy).reference():
        assert torch.equal(latents_of(policy), base)
    policy.save_adapter(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(pipeline_folder)
    pipe.load_lora_weights(str(tmp_path))
    ours = latents_of(policy)
    assert_close(ours, latents_by_diffusers(pipe, policy))
    assert (ours - base).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["alpha", "pissa"])
def test_lora_of_xl_loads_in_plain_diffusers(xl_folder, tmp_path, kind):
    policy = trained(load(xl_folder, **KINDS[kind]))
    policy.save_adapter(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(xl_folder)
    pipe.load_lora_weights(str(tmp_path))
    assert_close(latents_of(policy), latents_by_diffusers(pipe, policy))


@kinds
def test_lora_of_every_kind_comes_back_to_the_bit(pipeline_folder, tmp_path, kind):
    policy = trained(load(pipeline_folder, **kind))
    policy.save_adapter(tmp_path)
    other = load(pipeline_folder, **{**kind, "seed": 6})
    other.load_adapter(tmp_path)
    weights = policy.network.state_dict()
    for name, weight in other.network.state_dict().items():
        assert torch.equal(weight, weights[name]), name


@kinds
def test_only_the_lora_is_trained(pipeline_folder, kind):
    policy = load(pipeline_folder, **kind)
    with policy.reference():  # leaves it as it was
        pass
    names = [name for name, parameter in policy.network.named_parameters() if parameter.requires_grad]
    assert names
    assert all(".default." in name for name in names)
    assert all(parameter.dtype == torch.float32 for parameter in policy.network.parameters())


def test_lora_is_float32_on_a_base_that_is_not(pipeline_folder):
    policy = load(pipeline_folder, dtype=torch.bfloat16, use_dora=True)
    dtypes = {(parameter.requires_grad, parameter.dtype) for parameter in policy.network.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_dropout": 1.0}, r"lora_dropout is 1.0; it must lie in \[0, 1\)"),
        ({"init_lora_weights": "eva"}, "init_lora_weights eva needs a pass over training data"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights loftq is for quantized"),
        ({"init_lora_weights": "zeros"}, "'zeros'; it must be one of default, gaussian"),
        ({"init_lora_weights": "pissa", "use_dora": True}, "pissa with use_dora could not be saved"),
        ({"init_lora_weights": "orthogonal", "lora_rank": 3}, "even lora_rank; it is 3"),
        ({"lora_rank": 0}, "lora_rank is 0"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"tune": "some"}, "tune is 'some'"),
        ({"tune": "full", "init_adapter": "a"}, "fuse it: base_adapters"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AdapterSettings(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "pissa"}, r"for linear layers, and \S*conv\S* is none; set lora_target_modules"),
        ({"init_lora_weights": "olora", "lora_rank": 17, **ATTENTION}, "at most 16"),
    ],
)
def test_initial_weights_that_do_not_fit_the_layers(pipeline_folder, settings, message):
    with pytest.raises(ValueError, match=message):
        load(pipeline_folder, **settings)


# ---- Starting from other LoRAs ----


@pytest.fixture
def lora_folder(pipeline_folder, tmp_path):
    """A LoRA of rank 3, rsLoRA, on two layers of the attention."""
    settings = {"lora_rank": 3, "lora_alpha": 2.0, "use_rslora": True, "lora_target_modules": ["to_q", "to_out.0"]}
    trained(load(pipeline_folder, **settings)).save_adapter(tmp_path / "lora")
    return str(tmp_path / "lora")


def test_run_starts_from_a_lora(pipeline_folder, lora_folder, tmp_path):
    policy = load(pipeline_folder, init_adapter=lora_folder, lora_rank=8)
    pipe = DiffusionPipeline.from_pretrained(pipeline_folder)
    base = latents_by_diffusers(pipe, policy)
    pipe.load_lora_weights(lora_folder)
    assert_close(latents_of(policy), latents_by_diffusers(pipe, policy))
    with policy.reference():
        assert torch.equal(latents_of(policy), base)
    policy.save_adapter(tmp_path / "again")
    first, again = (load_file(f"{folder}/{LORA_WEIGHTS}") for folder in (lora_folder, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    trained(policy)
    policy.save_adapter(tmp_path / "trained")
    pipe.unload_lora_weights()
    pipe.load_lora_weights(str(tmp_path / "trained"))
    assert_close(latents_of(policy), latents_by_diffusers(pipe, policy))


def test_lora_to_start_from_without_metadata_has_alpha_of_its_rank(pipeline_folder, lora_folder, tmp_path):
    """As older files of diffusers are; and a file has a name of its own."""
    save_file(load_file(f"{lora_folder}/{LORA_WEIGHTS}"), tmp_path / "plain.safetensors")
    settings = {"init_adapter": str(tmp_path / "plain.safetensors"), "lora_rank": 8}
    policy = load(pipeline_folder, **settings)
    rounded = load(pipeline_folder, dtype=torch.bfloat16, **settings)
    pairs = zip(policy.network.parameters(), rounded.network.parameters(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs if mine.requires_grad)
    assert policy.network.peft_config["default"].lora_alpha == 3
    pipe = DiffusionPipeline.from_pretrained(pipeline_folder)
    pipe.load_lora_weights(str(tmp_path), weight_name="plain.safetensors")
    assert_close(latents_of(policy), latents_by_diffusers(pipe, policy))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_rank": 5}, r"lora_rank is 5, but init_adapter .* was trained with 3"),
        ({"use_dora": True}, "use_dora is True, but"),
        ({"lora_target_modules": ["to_q"]}, "on other layers than lora_target_modules names"),
    ],
)
def test_settings_that_the_lora_to_start_from_contradicts(pipeline_folder, lora_folder, settings, message):
    with pytest.raises(ValueError, match=message):
        load(pipeline_folder, init_adapter=lora_folder, **{"lora_rank": 8, **settings})


@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters:RuntimeWarning")
def test_lora_of_another_model_is_refused(pipeline_folder, xl_folder, tmp_path):
    load(pipeline_folder).save_adapter(tmp_path)
    for settings in ({"init_adapter": str(tmp_path)}, {"base_adapters": [str(tmp_path)]}):
        with pytest.raises(ValueError, match="does not fit this pipeline"):
            load(xl_folder, **settings)


def test_what_is_no_lora_folder(pipeline_folder, tmp_path):
    for settings in ({"init_adapter": str(tmp_path / "no")}, {"base_adapters": [str(tmp_path / "no")]}):
        with pytest.raises(ValueError, match="there is no LoRA folder"):
            load(pipeline_folder, **settings)
    with pytest.raises(ValueError, match=f"holds no {LORA_WEIGHTS}"):
        load(pipeline_folder, init_adapter=str(tmp_path))
    (tmp_path / LORA_WEIGHTS).write_text("nothing of the kind")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load(pipeline_folder, init_adapter=str(tmp_path))
    save_file({"text_encoder.layer.lora_A.weight": torch.zeros(2, 2)}, tmp_path / LORA_WEIGHTS)
    with pytest.raises(ValueError, match="changes a text encoder too"):
        load(pipeline_folder, init_adapter=str(tmp_path))


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_loras_underneath_are_fused(pipeline_folder, lora_folder, tmp_path, tune):
    trained(load(pipeline_folder, lora_rank=4)).save_adapter(tmp_path / "second")
    folders = [lora_folder, str(tmp_path / "second")]
    policy = load(pipeline_folder, base_adapters=folders, tune=tune)
    pipe = DiffusionPipeline.from_pretrained(pipeline_folder)
    for folder in folders:
        pipe.load_lora_weights(folder)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    fused = latents_by_diffusers(pipe, policy)
    assert_close(latents_of(policy), fused)
    with trained(policy).reference():
        assert_close(latents_of(policy), fused)
    policy.save_adapter(tmp_path / "ours")
    if tune == "lora":
        pipe.load_lora_weights(str(tmp_path / "ours"))
    else:
        pipe.unet = UNet2DConditionModel.from_pretrained(tmp_path / "ours", subfolder="unet")
    assert_close(latents_of(policy), latents_by_diffusers(pipe, policy))


# ---- All weights ----


@pytest.mark.parametrize("gathered", [False, True], ids=["own", "gathered"])
def test_whole_unet_loads_in_plain_diffusers(pipeline_folder, tmp_path, gathered):
    policy = load(pipeline_folder, tune="full")
    base = latents_of(policy)
    with trained(policy).reference():
        assert torch.equal(latents_of(policy), base)
    ours = latents_of(policy)
    policy.save_adapter(tmp_path, policy.network.state_dict() if gathered else None)
    pipe = DiffusionPipeline.from_pretrained(pipeline_folder)
    pipe.unet = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    assert_close(ours, latents_by_diffusers(pipe, policy))
    assert (ours - base).abs().max() > 0.01
    assert [path.suffix for path in (tmp_path / "unet").iterdir() if path.name != "config.json"] == [".safetensors"]


def test_whole_unet_comes_back_to_the_bit(pipeline_folder, sd2_folder, tmp_path):
    policy = trained(load(pipeline_folder, tune="full", keep_reference=False))
    assert not policy.has_reference
    policy.save_adapter(tmp_path)
    other = load(pipeline_folder, tune="full")
    other.load_adapter(tmp_path)
    for mine, theirs in zip(policy.network.parameters(), other.network.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    with other.reference():
        assert torch.equal(latents_of(other), latents_of(load(pipeline_folder)))  # not the weights that came back
    with pytest.raises(ValueError, match="has other layers than this run's"):
        load(sd2_folder, tune="full").load_adapter(tmp_path)
    shutil.rmtree(tmp_path / "unet")
    with pytest.raises(ValueError, match="holds no folder `unet`"):
        other.load_adapter(tmp_path)


def test_whole_unet_is_float32_and_all_of_it_is_trained(pipeline_folder):
    policy = load(pipeline_folder, tune="full", dtype=torch.bfloat16)
    assert {(weight.dtype, weight.requires_grad) for weight in policy.network.parameters()} == {(torch.float32, True)}
    assert policy.pipeline.vae.dtype == torch.bfloat16
    assert not any(weight.requires_grad for weight in policy.trained.base.parameters())
