"""Training of every kind of LoRA, and of the whole U-Net: the same promises as for the plain LoRA."""

import os

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from reward.feedback import Reward
from rl.adapter import LORA_WEIGHTS
from rl.checkpoints import complete_checkpoints

KINDS = {
    "full": {"tune": "full", "learning_rate": 0.001},
    "dora": {"use_dora": True, "lora_target_modules": ["to_q"], "learning_rate": 0.01},
    "pissa": {"init_lora_weights": "pissa", "lora_target_modules": ["to_q"], "learning_rate": 0.01},
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(checkpoint):
    file = checkpoint / LORA_WEIGHTS
    return load_file(file if file.is_file() else checkpoint / "unet/diffusion_pytorch_model.safetensors")


@kinds
def test_ratio_is_exactly_one_and_a_resumed_run_is_the_uninterrupted_one(make_trainer, tmp_path, kind):
    whole = make_trainer(output_dir=str(tmp_path / "whole"), num_train_epochs=2, beta=0.1, **kind)
    whole.train()
    assert logged(whole, "ratio_deviation") == [0, 0]
    assert logged(whole, "kl")[0] < 1e-9 < logged(whole, "kl")[1]
    make_trainer(output_dir=str(tmp_path / "part"), num_train_epochs=1, beta=0.1, **kind).train()
    rest = make_trainer(output_dir=str(tmp_path / "part"), num_train_epochs=2, beta=0.1, **kind)
    rest.train(resume_from_checkpoint="latest")
    one, two = weights(tmp_path / "whole/checkpoint-2"), weights(tmp_path / "part/checkpoint-2")
    before = weights(tmp_path / "whole/checkpoint-1")
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name
    assert any(not torch.equal(one[name], before[name]) for name in one)
    assert logged(whole, "reward") == logged(rest, "reward")
    assert logged(whole, "kl") == logged(rest, "kl")


def test_a_run_from_another_lora_goes_on_with_the_rank_of_that(make_trainer, tmp_path):
    """Its settings leave `lora_rank` out, so the default stands there."""
    first = make_trainer(output_dir=str(tmp_path / "first"), num_train_epochs=1, lora_rank=3)
    first.train()
    settings = {"init_adapter": str(complete_checkpoints(tmp_path / "first")[-1]), "lora_rank": 8}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), num_train_epochs=2, **settings)
    whole.train()
    make_trainer(output_dir=str(tmp_path / "part"), num_train_epochs=1, **settings).train()
    rest = make_trainer(output_dir=str(tmp_path / "part"), num_train_epochs=2, **settings)
    rest.train(resume_from_checkpoint="latest")
    (one, two) = (weights(complete_checkpoints(tmp_path / name)[-1]) for name in ("whole", "part"))
    assert {weight.shape[0] for name, weight in one.items() if "lora_A" in name} == {3}
    assert all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(ValueError, match=r"lora_rank is 8, but the LoRA in .* has the rank 3"):
        make_trainer(output_dir=str(tmp_path / "part"), num_train_epochs=3, lora_rank=8).train(
            resume_from_checkpoint="latest"
        )


def test_whole_unet_is_pulled_back_to_the_base(make_trainer, tmp_path):
    """With a reward that does not care, nothing else moves it."""

    def indifferent(images, prompts):
        return Reward(total=torch.zeros(len(images)))

    trainer = make_trainer(
        indifferent, tune="full", beta=1.0, num_train_epochs=4, learning_rate=1e-4, save_strategy="no"
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in trainer.model.parameters():
        parameter.data += 0.003 * torch.randn(parameter.shape, generator=generator)
    trainer.train()
    kl = logged(trainer, "kl")
    assert 0 < kl[-1] < 0.8 * kl[0]


def test_whole_unet_without_kl_keeps_no_base_and_leaves_its_folder(make_trainer):
    trainer = make_trainer(tune="full", num_train_epochs=1, activation_checkpointing=True)
    assert trainer.policy.trained.base is None
    trainer.train()
    assert not logged(trainer, "kl")
    trainer.save_model()
    folder = trainer.args.output_dir
    assert sorted(os.listdir(folder)) == ["checkpoint-1", "scheduler", "unet"]
    ours = trainer.policy.pipeline.unet.state_dict()
    theirs = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_kl_needs_the_base_model(make_trainer):
    trainer = make_trainer(tune="full")
    trainer.args.beta = 0.1
    with pytest.raises(ValueError, match=r"beta is 0\.1, but the policy keeps no base model"):
        type(trainer)(trainer.policy, trainer.reward_fn, trainer.args, trainer.prompts)


@pytest.mark.parametrize(
    ("ignored", "obeyed"),
    [
        ({"lora_rank": 3, "tune": "full"}, {"tune": "lora"}),
        ({"use_dora": True, "tune": "full"}, {"tune": "lora"}),
        ({"init_lora_weights": "gaussian", "init_adapter": "folder"}, {"init_adapter": None}),
    ],
)
def test_settings_of_another_kind_are_warned_about(make_args, caplog, ignored, obeyed):
    make_args(**{"lora_rank": 8, "lora_alpha": 8.0, **ignored, **obeyed})
    assert "is ignored" not in caplog.text
    make_args(**{"lora_rank": 8, "lora_alpha": 8.0, **ignored})
    name, value = next(iter(ignored.items()))
    assert f"{name}={value!r} is ignored" in caplog.text
