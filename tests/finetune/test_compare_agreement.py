"""What a comparison has `finetune.agreement` do: on which pictures, by which settings, and what becomes of failures."""

import json
from contextlib import nullcontext

import pytest
import torch

from finetune.agreement import AgreementArguments
from finetune.compare.__main__ import main
from finetune.compare.agreement import agreement_command, agreement_rewards, check_agreement, is_agreed
from finetune.compare.entrants import parse_entrant, run_flags
from finetune.compare.folder import AGREEMENT
from finetune.generate import Generation, GenerationArguments
from finetune.pool import open_pool, read_pictures
from finetune.run import load_policy
from reward.arguments import parse_arguments
from rl.experience import rollout_noise
from rl.policy import StableDiffusionPolicy
from rl.rollout import sample
from tests.finetune.compare_case import Figures, comparison_of, settings_of, write_agreement

PROMPTS = ["a red circle", "two green star"]


@pytest.fixture
def compare(tmp_path, pipeline_folder):
    """A comparison whose entrants all have some changes."""

    def make(common=None, **changes):
        return comparison_of(tmp_path, pipeline_folder, **{"agreement_prompts": 2, "common": common or {}, **changes})

    return make


@pytest.fixture
def write_lora(tmp_path, pipeline_folder):
    """A LoRA that shows, and whose alpha is not its rank."""

    def write(name, seed):
        policy = StableDiffusionPolicy.load(pipeline_folder, lora_rank=2, lora_alpha=8.0)
        generator = torch.Generator().manual_seed(seed)
        for parameter in policy.network.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
        policy.save_adapter(tmp_path / name)
        return str(tmp_path / name)

    return write


def forget(comparison, failed):
    """What `finetune.agreement` leaves where rewards failed."""
    file = comparison.folder / AGREEMENT
    found = json.loads(file.read_text())
    for table in (found["within"], found["across"], found["accuracy"]):
        for name in failed:
            table.pop(name, None)
    tables = [found["milliseconds"], *(row for name in ("within", "across", "accuracy", "noise", "defects")
                                       for row in found[name].values())]  # fmt: skip
    for table in tables:
        for name in failed:
            table.pop(name, None)
    found["raters"] = [name for name in found["raters"] if name not in failed]
    file.write_text(json.dumps(found | {"failed": failed}))


def test_agreement_that_lacks_a_reward_that_failed_is_asked_for_again(compare):
    comparison = compare()
    rewards = agreement_rewards(comparison)
    assert not is_agreed(comparison, rewards)
    write_agreement(comparison)
    assert is_agreed(comparison, rewards)
    forget(comparison, {"plain": "RuntimeError: no licence"})
    assert not is_agreed(comparison, rewards)
    assert is_agreed(comparison, agreement_rewards(comparison, leave_out=["plain"]))
    forget(comparison, {})
    assert is_agreed(comparison, rewards)


@pytest.mark.parametrize("failed", ["satisfied", "plain"])
def test_a_report_is_written_of_what_the_others_said(compare, tmp_path, pipeline_folder, failed):
    """Whether it is the one that the others are held against that failed, or another."""
    comparison = compare()
    Figures(comparison, {}).write()
    write_agreement(comparison)
    forget(comparison, {failed: "RuntimeError: no licence"})
    file = tmp_path / "comparison.yaml"
    file.write_text(json.dumps(settings_of(tmp_path, pipeline_folder, agreement_prompts=2)))
    main(["--config", str(file), "--report_only", "true"])
    said = json.loads((comparison.folder / "report.json").read_text())["agreement"]
    rest = [name for name in ("satisfied", "blue", "redness", "plain") if name != failed]
    assert said["rewards"] == said["raters"] == rest
    assert list(said["accuracy"]) == [name for name in ("satisfied",) if name != failed]
    for name in ("report.html", "report.md"):
        assert f"{failed} failed, and is left out: RuntimeError: no licence" in (comparison.folder / name).read_text()


def drawn_by_agreement(comparison, folder):
    """The pictures of the command itself, (N, 3, H, W) in [0, 1], and its settings."""
    command = agreement_command(comparison, agreement_rewards(comparison))[1:]
    flags = [*command, "--prompts", comparison.arguments.prompts]
    _, settings = parse_arguments([AgreementArguments, GenerationArguments], flags)
    drawing = Generation(folder, settings, PROMPTS)
    drawing.draw(drawing.missing(), settings.load())
    drawing.finish()
    return torch.stack(read_pictures(open_pool(folder), range(len(drawing)))).float() / 255, settings


@torch.no_grad()
def drawn_by_entrant(comparison, settings):
    """Of the same noise, by the policy that the first entrant's training starts from."""
    entrant = comparison.entrants[0]
    run, args = parse_entrant(entrant.command, run_flags(comparison, entrant, 0, comparison.folder / "run"))
    policy = load_policy(run.policy, args)
    _, schedule = args.make_schedule(policy.scheduler)
    prompts = [prompt for prompt in PROMPTS for _ in range(settings.num_generations)]
    noise = rollout_noise(policy, schedule, settings.seed, "pool", range(len(prompts)))
    with torch.autocast("cpu", torch.bfloat16) if args.bf16 else nullcontext():
        drawn = sample(policy, policy.network, prompts, noise, schedule, guidance_scale=args.guidance_scale)
    return policy.decode(drawn.final_latents)


@pytest.mark.parametrize("base", [False, True], ids=["alone", "on another"])
def test_agreement_is_asked_about_what_a_lora_to_start_from_draws(compare, write_lora, tmp_path, base):
    changes = {"init_adapter": write_lora("start", 0), "guidance_scale": 2.0, "start_timestep": 899,
               "base_adapters": [write_lora("under", 1)] if base else []}  # fmt: skip
    comparison = compare({name: value for name, value in changes.items() if value})
    check_agreement(comparison)
    ours, settings = drawn_by_agreement(comparison, tmp_path / "ours")
    assert settings.base_adapters == [*changes["base_adapters"], changes["init_adapter"]]
    torch.testing.assert_close(ours, drawn_by_entrant(comparison, settings), atol=0.01, rtol=0)
    bare, _ = drawn_by_agreement(compare({"guidance_scale": 2.0, "start_timestep": 899}), tmp_path / "bare")
    assert (ours - bare).abs().max() > 0.05


def test_the_precision_of_weights_is_that_of_the_training(compare, tmp_path):
    comparison = compare({"bf16": True, "model_dtype": "bfloat16", "vae_tiling": True})
    check_agreement(comparison)
    ours, settings = drawn_by_agreement(comparison, tmp_path / "ours")
    assert (settings.model_dtype, settings.vae_tiling, settings.vae_slicing) == ("bfloat16", True, False)
    assert (ours - drawn_by_entrant(comparison, settings)).abs().mean() < 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sde_window": "0:1"}, "'red' .* cannot draw by its sde_window 0:1; give `agreement: {pictures: "),
        ({"original_size": [32, 32]}, r"original_size \[32, 32\]"),
        ({"target_size": [32, 32]}, r"target_size \[32, 32\]"),
        ({"crops_coords_top_left": [0, 8]}, r"crops_coords_top_left \[0, 8\]"),
        ({"bf16": True}, "bf16 with model_dtype float32, not bfloat16; .* or `agreement_prompts: 0`"),
    ],
)
def test_a_start_that_agreement_cannot_draw_is_refused(compare, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        check_agreement(compare(change))
    check_agreement(compare(change, agreement_prompts=0))
    folder = tmp_path / "rated"
    drawn_by_agreement(compare(), folder)  # any pictures with prompts
    comparison = compare(change, agreement={"pictures": str(folder)})
    check_agreement(comparison)
    write_agreement(comparison)
    check_agreement(compare(change))  # it was measured before, on whatever pictures


@pytest.mark.parametrize("agreement", [{"choices": "pairs"}, {"pictures": "rated", "labels": ["overall"]}])
def test_settings_of_agreement_that_is_not_measured_are_refused(compare, agreement):
    with pytest.raises(ValueError, match=f"agreement sets {', '.join(agreement)}, .* agreement_prompts is 0.* above 0"):
        check_agreement(compare(agreement=agreement, agreement_prompts=0))
    check_agreement(compare(agreement_prompts=0))
