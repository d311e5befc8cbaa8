"""A LoRA's dropout: what is dropped, for whom, and that a picture's update drops what its rollout dropped."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from rl.keyed import keyed_noise
from rl.lora_dropout import InputDropout
from rl.memory import MemorySettings
from rl.rollout import sample
from rl.sde import ddim_scheduler, make_schedule
from tests.rl.conftest import PROMPTS
from tests.rl.outcomes import assert_resumes_to_the_bit, logged
from tests.rl.test_adapter import KINDS, load, trained

DROPPED = {"lora_dropout": 0.5}
COUNT = 2
KEYS = [(0, "dropout", place) for place in range(COUNT)]
FIRST = {"train_steps": ["0:1"], "gradient_accumulation_steps": 2}  # all of a rollout is one update


def predict(policy, conditioning, guidance_scale=1.0):
    latents = keyed_noise(1, 0, range(COUNT), policy.latent_shape)
    return policy.predict(policy.network, latents, torch.tensor([500, 20]), conditioning, guidance_scale)


def dropping(policy, keys=KEYS):
    return policy.drop_inputs(policy.encode(PROMPTS[:COUNT]), keys)


def adapted(policy):
    """The layers, in the order of `LoraDropout`."""
    return [layer for layer in policy.network.modules() if hasattr(layer, "lora_A")]


def without_columns(policy, kept):
    """The same policy whose A's have those columns only, (F,) bool, made larger by as much as dropout does."""
    places = kept.split([layer.in_features for layer in adapted(policy)])
    for layer, own in zip(adapted(policy), places, strict=True):
        for matrix in layer.lora_A.values():
            shape = (1, -1, 1, 1) if matrix.weight.ndim == 4 else (1, -1)
            matrix.weight.data = matrix.weight.data * own.view(shape) * 2
    return policy


def test_an_input_is_dropped_at_all_places_or_kept_and_scaled():
    factors = torch.tensor([[1.25, 0, 1.25], [0, 1.25, 1.25]])
    for values, axis in ((torch.ones(2, 3), -1), (torch.ones(2, 5, 3), -1), (torch.ones(2, 3, 4, 4), 1)):
        layer = InputDropout(axis)
        layer.factors = factors
        expected = factors.view(2, *[1] * (values.ndim - 2), 3).movedim(-1, axis)
        assert torch.equal(layer(values), expected.expand_as(values))
    with pytest.raises(AssertionError, match="other rows"):
        layer(values[:1])


def test_what_is_dropped_is_drawn_by_the_key_alone_and_as_often_as_asked_for(pipeline_folder):
    dropout = load(pipeline_folder, lora_dropout=0.3).trained.dropout
    kept = dropout.draw([(seed, "x") for seed in range(200)])
    assert kept.dtype == torch.bool
    assert torch.equal(dropout.draw([(7, "x"), (3, "x"), (7, "x")]), kept[[7, 3, 7]])
    assert float(kept.float().mean()) == pytest.approx(0.7, abs=4 * (0.21 / kept.numel()) ** 0.5)
    assert 0.4 < float((kept[0] == kept[1]).float().mean()) < 0.75  # 0.58


@torch.no_grad()
@pytest.mark.parametrize("kind", ["alpha", "rslora", "pissa"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_dropped_inputs_are_columns_of_a_that_are_not_there(pipeline_folder, kind, guidance_scale):
    """Each picture of a batch has its own, in both halves of guidance."""
    policy = trained(load(pipeline_folder, **KINDS[kind], **DROPPED))
    conditioning = dropping(policy)
    together = predict(policy, conditioning, guidance_scale)
    assert not torch.equal(together, predict(policy, policy.encode(PROMPTS[:COUNT]), guidance_scale))
    for place in range(COUNT):
        other = trained(load(pipeline_folder, **KINDS[kind]))
        without_columns(other, conditioning.kept_inputs[place])
        alone = predict(other, other.encode(PROMPTS[:COUNT]), guidance_scale)
        torch.testing.assert_close(together[place], alone[place], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dora", "olora", "pissa"])
def test_what_starts_from_the_base_starts_as_the_base_whatever_is_dropped(pipeline_folder, kind):
    policy = load(pipeline_folder, **KINDS[kind], **DROPPED)
    policy.network.train()
    found = predict(policy, dropping(policy))
    with policy.reference():
        torch.testing.assert_close(found, predict(policy, dropping(policy)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_of_a_dora_all_that_it_adds_is_without_what_is_dropped(pipeline_folder):
    """W x + (m / n - 1) W x' + (m / n) s B A x', where x' is what is left of x; and nothing else is asked of it."""
    policy = trained(load(pipeline_folder, use_dora=True, lora_alpha=4.0, lora_target_modules=["to_q"], **DROPPED))
    policy.network.train()
    layer, dropout = adapted(policy)[0], policy.trained.dropout
    base, values = layer.get_base_layer().weight, torch.randn(1, 5, layer.in_features)
    kept = dropout.draw(KEYS[:1])
    left = values * kept[0, : layer.in_features] * 2
    update = 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight  # alpha / rank
    ratio = layer.lora_magnitude_vector["default"].weight / (base + update).norm(dim=1)
    expected = values @ base.T + (ratio - 1) * (left @ base.T) + ratio * (left @ update.T)
    bias = layer.get_base_layer().bias
    with dropout.applied(kept):
        torch.testing.assert_close(layer(values), expected + (0 if bias is None else bias), rtol=1e-4, atol=1e-5)
    policy.network.eval()
    with pytest.raises(AssertionError, match="a DoRA would drop nothing"), dropout.applied(kept):
        pass


@torch.no_grad()
def test_where_nothing_is_dropped_a_dora_is_as_without_dropout_in_any_precision(pipeline_folder):
    """Peft computes otherwise where something stands before A, and not on a base of bfloat16."""
    outputs = []
    for settings in (DROPPED, {}):
        policy = trained(load(pipeline_folder, use_dora=True, dtype=torch.bfloat16, **settings))
        policy.network.train()
        with policy.trained.dropout.applied(None) if settings else nullcontext():
            outputs.append(predict(policy, policy.encode(PROMPTS[:COUNT])))
    assert torch.equal(*outputs)


@torch.no_grad()
def test_pictures_are_drawn_without_unless_asked_for(pipeline_folder):
    """And a picture drops the same in all steps: it is drawn by one policy, which is not folded."""
    policy, plain = (trained(load(pipeline_folder, **settings)) for settings in (DROPPED, {}))
    schedule = make_schedule(ddim_scheduler(policy.scheduler), 3, eta=1.0)
    noise = keyed_noise(0, 0, range(COUNT), (4, *policy.latent_shape))

    def draw(policy, prompts=PROMPTS[:COUNT], noise=noise, keys=None):
        return sample(policy, policy.network, prompts, noise, schedule, dropout_keys=keys).final_latents

    assert torch.equal(draw(policy), draw(plain))
    dropped = draw(policy, keys=KEYS)
    kept = dropping(policy).kept_inputs[0]
    torch.testing.assert_close(
        dropped[:1], draw(without_columns(plain, kept), PROMPTS[:1], noise[:1]), rtol=1e-4, atol=1e-4
    )
    assert all(isinstance(layer.lora_dropout["default"], nn.Identity) for layer in adapted(policy))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"guidance_scale": 3.0},
        {"share_noise": "around"},
        {"use_dora": True, "lora_target_modules": ["to_q"]},
        {"train_text_encoder": True},
        {"activation_checkpointing": True},
        {"credit": "words", "guidance_scale": 3.0},
    ],
    ids=["plain", "guidance", "trunks", "dora", "text encoder", "activations again", "words"],
)
def test_an_update_drops_what_its_rollout_dropped(make_trainer, settings):
    """Or the ratio of the first pass would not be 1: also where the LoRA has learned, in the second rollout."""
    trainer = make_trainer(learning_rate=0.05, **FIRST, **DROPPED, **settings)
    trainer.train()
    assert logged(trainer, "ratio_deviation") == [0, 0]
    plain = make_trainer(learning_rate=0.05, **FIRST, **settings)
    plain.train()
    first, second = zip(logged(trainer, "reward"), logged(plain, "reward"), strict=True)
    assert first[0] == pytest.approx(first[1], abs=1e-6)  # nothing learned, nothing to drop
    assert abs(second[0] - second[1]) > 1e-6


def test_a_group_drops_the_same_and_another_group_or_rollout_does_not(make_trainer):
    trainer = make_trainer(**DROPPED)
    keys = trainer.dropout_keys(0, range(8))
    assert [len(set(keys[:4])), len(set(keys[4:])), len(set(keys))] == [1, 1, 2]
    assert not set(keys) & set(trainer.dropout_keys(1, range(8)))
    alone = make_trainer(num_generations=1, advantage_baseline="batch", **DROPPED)
    assert len(set(alone.dropout_keys(0, range(8)))) == 8


def test_what_was_dropped_learns_nothing(make_trainer):
    """Plain gradient descent from one group: the columns of A that it dropped stay as they were, others move."""
    trainer = make_trainer(
        num_train_epochs=1, generation_batch_size=4, train_steps=["0:1"], gradient_accumulation_steps=1, optim="sgd",
        learning_rate=1.0, max_grad_norm=0.0, **DROPPED,
    )  # fmt: skip
    trained(trainer.policy)
    layers = adapted(trainer.policy)
    before = [layer.lora_A["default"].weight.detach().clone() for layer in layers]
    (kept,) = trainer.policy.trained.dropout.draw(trainer.dropout_keys(0, [0]))
    trainer.train()
    for layer, old, own in zip(layers, before, kept.split([layer.in_features for layer in layers]), strict=True):
        moved = (layer.lora_A["default"].weight.detach() - old).abs().movedim(1, 0).flatten(1).amax(dim=1)
        assert torch.all(moved[~own] == 0)
        assert torch.any(moved[own] > 0)


def test_a_resumed_run_drops_on_to_the_same_bits(make_trainer, tmp_path):
    assert_resumes_to_the_bit(make_trainer, tmp_path, learning_rate=0.05, **DROPPED)


def test_trunks_draw_and_learn_what_pictures_one_by_one_do(make_trainer, monkeypatch):
    settings = {"share_noise": "around", "optim": "sgd", "learning_rate": 0.02, **DROPPED}
    once = make_trainer(**settings)
    once.train()
    monkeypatch.setattr("rl.ddpo.DDPOTrainer.trunks", lambda *_: None)
    each = make_trainer(**settings)
    each.train()
    for name in ("loss", "grad_norm", "reward"):
        assert logged(once, name) == pytest.approx(logged(each, name), rel=1e-3, abs=1e-5), name


@pytest.mark.filterwarnings("ignore")  # of what torch's own compiler does
def test_compiled_blocks_drop_what_others_do(pipeline_folder, monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **how: compile_(*args, **how | {"backend": "aot_eager"}))
    found = []
    for compiled in (False, True):
        policy = trained(load(pipeline_folder, memory=MemorySettings(torch_compile_unet=compiled), **DROPPED))
        outputs = [predict(policy, dropping(policy, keys)) for keys in (KEYS, KEYS[::-1], None)]
        sum(output.square().mean() for output in outputs).backward()
        gradients = [weight.grad for weight in policy.network.parameters() if weight.requires_grad]
        found.append([*(output.detach() for output in outputs), *gradients])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_the_whole_unet_has_no_dropout(pipeline_folder):
    policy = load(pipeline_folder, tune="full")
    assert dropping(policy).kept_inputs is None
