"""Whole trainings in bfloat16, and with compiled blocks: what GPUs run, on a CPU."""

import functools

import pytest
import torch

from finetune.run import load_policy
from rl.ddpo import DDPOTrainer
from tests.rl.conftest import PROMPTS
from tests.rl.outcomes import logged
from tests.rl.test_folded import count_adapted, predict
from tests.rl.toy_rewards import Redness


@pytest.fixture
def trained(pipeline_folder, make_args):
    """A trainer, as `run_ddpo.py` puts it together, that has trained, and the batches of its rollouts."""

    def train(**changes):
        args = make_args(**changes)
        trainer, seen = DDPOTrainer(load_policy(pipeline_folder, args), Redness(), args, PROMPTS), []
        rollout = trainer.rollout

        def kept(number):
            for batch in rollout(number):
                seen.append(batch)
                yield batch

        trainer.rollout = kept
        trainer.train()
        return trainer, seen

    return train


@pytest.mark.parametrize("model_dtype", ["bfloat16", "float32"])
def test_bfloat16_trains_with_float32_log_probs_and_a_ratio_of_one(trained, model_dtype):
    exact, _ = trained(learning_rate=0.01, beta=0.1)
    trainer, batches = trained(learning_rate=0.01, beta=0.1, bf16=True, model_dtype=model_dtype)
    frozen = {weight.dtype for weight in trainer.policy.network.parameters() if not weight.requires_grad}
    assert frozen == {getattr(torch, model_dtype)}
    assert {weight.dtype for weight in trainer.trained_weights()} == {torch.float32}
    for name in ("old_log_probs", "latents", "advantages"):
        assert {batch[name].dtype for batch in batches} == {torch.float32}, name
    assert logged(trainer, "ratio_deviation")[0] == 0, "the update computes as the rollout did"
    assert logged(trainer, "grad_norm")[0] == pytest.approx(logged(exact, "grad_norm")[0], rel=0.1)
    assert logged(trainer, "grad_norm") != logged(exact, "grad_norm")


@pytest.mark.parametrize(("lower", "folds"), [(False, True), (True, False)])
def test_under_the_trainers_autocast_a_lora_is_not_folded_into_what_will_be_rounded(trained, lower, folds):
    trainer, _ = trained(learning_rate=0.01, bf16=lower)
    ran = count_adapted(trainer.policy)
    with torch.no_grad(), trainer.policy.folded():
        predict(trainer.policy)
    assert bool(ran) != folds


@pytest.mark.filterwarnings("ignore")  # of what torch's own compiler does
def test_a_training_with_compiled_blocks_is_the_same(trained, monkeypatch):
    """But for what torch's C++ would make of what dynamo captures, which takes long to compile and is left out."""
    plain, _ = trained(learning_rate=0.01)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    compiled, _ = trained(learning_rate=0.01, torch_compile_unet=True)
    torch._dynamo.reset()
    for name in ("loss", "grad_norm", "reward"):
        assert logged(compiled, name) == pytest.approx(logged(plain, name), rel=1e-3, abs=1e-5), name
    for mine, other in zip(compiled.trained_weights(), plain.trained_weights(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-3)
