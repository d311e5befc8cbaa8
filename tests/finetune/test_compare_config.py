"""What is wrong with a comparison is said before anything is run."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file

import finetune.run
from finetune.command_line import as_flags
from finetune.compare.__main__ import main
from finetune.compare.agreement import check_agreement
from finetune.compare.config import CompareArguments, read_comparison
from finetune.compare.entrants import parse_entrant, run_flags
from finetune.compare.folder import check_folder, claim
from finetune.compare.rewards import Spec
from reward.arguments import parse_arguments
from tests.finetune.compare_case import (
    HELD_OUT,
    PLAIN,
    REDNESS,
    TRAIN,
    FailsAt,
    comparison_of,
    settings_of,
    write_agreement,
    write_config,
    write_prompts,
)
from tests.test_house import ROOT


def entrant(folder, pipeline, **changes):
    return {"config": write_config(folder, pipeline), "changes": changes}


def test_who_trains_on_what_follows_from_the_entrants(tmp_path, pipeline_folder):
    found = comparison_of(tmp_path, pipeline_folder)
    assert {one.name: found.trained_on_by(one) for one in found.evaluators} == {
        "satisfied": ["the judge"], "blue": ["the judge"], "redness": ["red"],
    }  # fmt: skip
    assert [one.name for one in found.impartial()] == ["satisfied", "blue"]  # the judge is an upper bound
    assert found.decide_by == "satisfied"
    assert len(found.specs()) == 3  # Judge, Redness, Plain
    assert (found.entrants[0].pictures, found.entrants[0].rollouts) == (4, 2)


def test_other_weights_are_the_same_eye_and_other_models_are_not():
    rich = "reward.rich:RichReward"
    one, other = Spec.of(rich, {"model": "a", "word_weight": 1.0}), Spec.of(rich, {"model": "a"})
    assert one.eyes == other.eyes
    assert one.key != other.key
    assert one.eyes != Spec.of(rich, {"model": "b"}).eyes
    assert one.eyes & Spec.sum_of({"x": {"reward": rich, "kwargs": {"model": "a"}}, "y": REDNESS}).eyes
    assert (
        Spec.of("reward.others:CLIPScore", {"model": "a", "dtype": "bfloat16"}).eyes
        == Spec.of("reward.others:CLIPScore", {"model": "a"}).eyes
    )


def test_an_eye_is_the_same_however_it_is_spelled(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    rich, others = "reward.rich:RichReward", "reward.others"
    places = ("a", "./a", "a/", str(tmp_path / "a"))
    assert len({frozenset(Spec.of(rich, {"model": place}).eyes) for place in places}) == 1
    named, elsewhere = f"{others}:PickScore", f"{others}.clip:PickScore"
    assert Spec.of(named, {"model": "b"}).eyes == Spec.of(elsewhere, {"model": "b"}).eyes
    asked = {"model": "b", "question": "Is it {prompt}?", "among": "answers", "template": "{question}"}
    assert Spec.of(f"{others}:VQAScore", {"model": "b"}).eyes == Spec.of(f"{others}:VQAScore", asked).eyes
    one, other = ({"model": "b.pt", "clip": clip} for clip in ("c", "d"))
    assert Spec.of(f"{others}:HPSv2", one).eyes == Spec.of(f"{others}:HPSv2", other).eyes
    assert not Spec.of(f"{others}:CLIPScore", {"model": "b"}).eyes & Spec.of(named, {"model": "b"}).eyes


def test_an_eye_without_a_model_is_told_by_its_texts(monkeypatch):
    fails = "tests.finetune.compare_case:FailsAt"
    assert Spec.of(fails, {"prompt": "a"}).eyes != Spec.of(fails, {"prompt": "b"}).eyes
    monkeypatch.setattr(FailsAt.__init__, "__defaults__", ("a",))
    assert Spec.of(fails, {"prompt": "a"}).eyes == Spec.of(fails).eyes


def test_an_entrant_may_change_nothing_but_the_weights_of_a_mixture(tmp_path, pipeline_folder):
    mixture = {"red": {"reward": REDNESS, "weight": 0.5}, "plain": {"reward": PLAIN}}
    found = comparison_of(
        tmp_path, pipeline_folder, entrants={"mixed": entrant(tmp_path, pipeline_folder, rewards=mixture)}
    )
    assert [(name, weight) for name, _, _, weight in found.entrants[0].spec.named] == [("red", 0.5), ("plain", 1.0)]


def test_back_propagation_is_an_entrant_too(tmp_path, pipeline_folder):
    settings = {"policy": pipeline_folder, "reward": REDNESS, "output_dir": "x", "use_cpu": True, "prompts": "x",
                "num_inference_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
                "report_to": "none"}  # fmt: skip
    (tmp_path / "draft.yaml").write_text(json.dumps(settings))
    draft = {"command": "finetune.draft", "config": str(tmp_path / "draft.yaml")}
    found = comparison_of(
        tmp_path, pipeline_folder, entrants={"draft": draft, "red": entrant(tmp_path, pipeline_folder)}
    )
    assert [(one.command, one.pictures, one.rollouts) for one in found.entrants] == [
        ("finetune.draft", 4, 2), ("run_ddpo", 4, 2),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"'draft'.*is not differentiable"):
        comparison_of(tmp_path, pipeline_folder, entrants={"draft": draft | {"changes": {"reward": PLAIN}}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"entrants": {}}, "there is no entrant"),
        ({"evaluators": {}}, "there is no evaluator"),
        ({"seeds": [1, 1]}, r"seeds names \[1\] twice"),
        ({"seeds": []}, "seeds is empty"),
        ({"budget_seconds": 5.0}, "give one of the two"),
        ({"budget_images": None}, "give one of the two"),
        ({"budget_images": 10}, "rollouts have 4 pictures, which do not divide budget_images"),
        ({"looks": 0}, "looks is 0"),
        ({"only": ["green"]}, r"only names \['green'\]; the entrants are red, plain"),
        ({"decide_by": "nobody"}, "decide_by is 'nobody'; the evaluators are satisfied, blue, redness"),
        ({"decide_by": "redness"}, "is trained on by red, so.*; decide by one of satisfied, blue$"),
        ({"evaluators": {"x": "tests.rl.toy_rewards:Rednes"}}, "has no attribute Rednes"),
        ({"evaluators": {"x": {"reward": REDNESS, "weight": 1}}}, "unknown key 'weight'"),
        ({"overlay": {"reward": REDNESS, "term": "red"}}, "overlay has a term; it shows maps"),
        ({"evaluators": {"base": REDNESS}}, "'base' is the policy before training"),
        ({"overlay": {"reward": "nowhere:Nothing"}}, "there is no module nowhere"),
        ({"common": {"seed": 3}}, "changes seed, which is the same for all.*comparison's seeds says it"),
        ({"common": {"stop_on": ["drawn"]}}, "changes stop_on.*budget_images or budget_seconds says it"),
        ({"common": {"save_steps": 2}}, "changes save_steps.*comparison's looks says it"),
        ({"common": {"nonsense": 3}}, "'red': unknown setting on the command line.*nonsense"),
        ({"common": {"policy": "./nowhere"}}, "'red': .*nowhere"),
        ({"held_out_prompts": 1}, "need at least 2"),
        ({"agreement_prompts": 2, "agreement_generations": 1}, "at least 2 pictures of each"),
        ({"prompts": "./none.txt"}, "cannot read the prompt file"),
        ({"entrants": {"red": {"config": "x.yaml", "against": "green"}}}, "against is 'green'; name another of.*: red"),
        ({"entrants": {"red": {"config": "x.yaml", "against": "red"}}}, "against is 'red'; name another"),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path, pipeline_folder, changes, message):
    with pytest.raises(ValueError, match=message):
        comparison_of(tmp_path, pipeline_folder, **changes)
    assert not (tmp_path / "comparison").exists()


def test_a_prompt_that_is_trained_on_cannot_be_held_out(tmp_path, pipeline_folder):
    settings = settings_of(tmp_path, pipeline_folder)
    (tmp_path / "held_out.txt").write_text("\n".join([*HELD_OUT, "A  red Circle", TRAIN[1]]))
    with pytest.raises(ValueError, match=r"2 prompts of .* are in .* too \('A  red Circle'; 'two green star'\)"):
        read_comparison(CompareArguments(**settings))
    (tmp_path / "held_out.txt").write_text("\n".join([*HELD_OUT, HELD_OUT[0]]))
    with pytest.raises(ValueError, match="has prompts twice"):
        read_comparison(CompareArguments(**settings))


def test_names_that_cannot_be_told_apart(tmp_path, pipeline_folder):
    one = entrant(tmp_path, pipeline_folder)
    with pytest.raises(ValueError, match="would share the folder a_b"):
        comparison_of(
            tmp_path, pipeline_folder, entrants={"a b": one, "a, b": entrant(tmp_path, pipeline_folder, reward=PLAIN)}
        )
    with pytest.raises(ValueError, match="are the same training under two names"):
        comparison_of(tmp_path, pipeline_folder, entrants={"a": one, "b": one})
    config = tmp_path / "twice.yaml"
    config.write_text("entrants:\n  a: {config: x}\n  a: {config: y}\n")
    with pytest.raises(ValueError, match="the key `a` is given twice"):
        parse_arguments([CompareArguments], ["--config", str(config)])


def test_an_upper_bound_is_one_or_is_none(tmp_path, pipeline_folder):
    wrong = entrant(tmp_path, pipeline_folder) | {"upper_bound": "false"}
    with pytest.raises(ValueError, match="upper_bound is 'false'; it is true or false"):
        comparison_of(tmp_path, pipeline_folder, entrants={"a": wrong})


def test_time_needs_a_learning_rate_that_does_not_know_the_end(tmp_path, pipeline_folder):
    by_time = {"budget_images": None, "budget_seconds": 60.0}
    assert comparison_of(tmp_path, pipeline_folder, **by_time).entrants[0].rollouts is None
    with pytest.raises(ValueError, match="lr_scheduler_type is cosine"):
        comparison_of(tmp_path, pipeline_folder, common={"lr_scheduler_type": "cosine"}, **by_time)


def test_where_time_decides_checkpoints_are_the_entrants_own_or_every_rollout(tmp_path, pipeline_folder):
    def every(**changes):
        found = comparison_of(tmp_path, pipeline_folder, budget_images=None, budget_seconds=60.0, **changes)
        _, args = parse_entrant("run_ddpo", run_flags(found, found.entrants[0], 0, tmp_path))
        return args.save_strategy, args.save_steps

    assert every() == ("steps", 1)
    assert every(common={"per_device_train_batch_size": 2}) == ("steps", 2)
    assert every(common={"save_steps": 3}) == ("steps", 3)
    with pytest.raises(ValueError, match=r"'red': save_steps \(3\) is not a multiple of the 2 updates"):
        every(common={"per_device_train_batch_size": 2, "save_steps": 3})
    own = _config(tmp_path, pipeline_folder, save_steps=7)
    assert every(entrants={"red": {"config": own}}) == ("steps", 7)
    assert every(entrants={"red": {"config": own}}, common={"save_steps": 2}) == ("steps", 2)


def test_an_entrant_ends_where_its_budget_does(tmp_path, pipeline_folder):
    own = _config(tmp_path, pipeline_folder, stop_on=["drawn"])
    with pytest.raises(ValueError, match=r"'red': its config has stop_on \['drawn'\], which may end it early"):
        comparison_of(tmp_path, pipeline_folder, entrants={"red": {"config": own}})


def test_a_configs_held_out_reward_is_taken_away_with_its_other_ones(tmp_path, pipeline_folder):
    own = _config(tmp_path, pipeline_folder, eval_rewards={"plain": PLAIN}, watch_reward="plain")
    found = comparison_of(tmp_path, pipeline_folder, entrants={"red": {"config": own}}).entrants[0]
    assert found.changes == {"eval_rewards": {}, "watch_reward": ""}
    kept = {"config": own, "changes": {"eval_rewards": {"plain": PLAIN}}}
    found = comparison_of(tmp_path, pipeline_folder, entrants={"red": kept}).entrants[0]
    assert "watch_reward" not in found.changes


@pytest.mark.parametrize("changes", [5, "abc", ["learning_rate"]])
def test_changes_that_are_no_settings_name_their_entrant(tmp_path, pipeline_folder, changes):
    entry = {"config": write_config(tmp_path, pipeline_folder), "changes": changes}
    with pytest.raises(ValueError, match=f"'red': changes is {re.escape(repr(changes))}; write a mapping"):
        comparison_of(tmp_path, pipeline_folder, entrants={"red": entry})


def test_a_folder_of_other_settings_is_refused_and_the_keys_are_listed(tmp_path, pipeline_folder):
    claim(comparison_of(tmp_path, pipeline_folder))
    check_folder(comparison_of(tmp_path, pipeline_folder, seeds=[0, 1, 2, 3], jobs=2, title="more of it"))
    check_folder(comparison_of(tmp_path, pipeline_folder, only=["red"]))
    with pytest.raises(
        ValueError, match=r"other settings \(.*entrants.red.learning_rate: None -> 0.5.*generations: 2 -> 3"
    ):
        check_folder(comparison_of(tmp_path, pipeline_folder, common={"learning_rate": 0.5}, generations=3))
    with pytest.raises(ValueError, match=r"evaluators\.blue"):
        check_folder(comparison_of(tmp_path, pipeline_folder, evaluators={"blue": PLAIN}))
    claim(comparison_of(tmp_path, pipeline_folder, only=["red"]))  # what the others were told is kept
    with pytest.raises(ValueError, match=r"entrants\.plain\.reward"):
        check_folder(comparison_of(tmp_path, pipeline_folder, entrants={"plain": entrant(tmp_path, pipeline_folder)}))


def test_other_files_are_left_alone(tmp_path, pipeline_folder):
    (tmp_path / "comparison").mkdir()
    (tmp_path / "comparison" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        main(["--config", _yaml(tmp_path, pipeline_folder)])
    assert [path.name for path in (tmp_path / "comparison").iterdir()] == ["thesis.tex"]


def test_an_evaluator_that_is_trained_on_is_allowed(tmp_path, pipeline_folder):
    found = comparison_of(tmp_path, pipeline_folder, evaluators={"redness": REDNESS})
    assert found.decide_by is None
    assert found.impartial() == []
    with pytest.raises(ValueError, match=r"trained on by red, so.*leave decide_by out"):
        comparison_of(tmp_path, pipeline_folder, evaluators={"redness": REDNESS}, decide_by="redness")
    alone = comparison_of(tmp_path, pipeline_folder, only=["plain", "the judge"], decide_by="blue")
    assert alone.decide_by == "blue"  # an upper bound may train on it


def test_the_small_worlds_preset_is_whole():
    (arguments,) = parse_arguments([CompareArguments], ["--config", str(ROOT / "configs" / "compare_tinyworld.yaml")])
    found = read_comparison(arguments)
    assert [one.name for one in found.entrants if one.upper_bound] == ["the true judge"]
    assert found.decide_by == "satisfied"
    assert [one.name for one in found.impartial()] == ["satisfied", "overall", "plausibility", "alignment"]
    assert {one.rollouts for one in found.entrants} == {20}
    assert len(arguments.seeds) == 5


def test_the_preset_of_a_large_model_is_whole_but_for_its_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(finetune.run, "load_scheduler", lambda policy: DDIMScheduler())  # its own is on the hub
    monkeypatch.setattr(Spec, "check", lambda reward: None)  # weights are the user's
    prompts = write_prompts(tmp_path)
    flags = [
        "--config",
        str(ROOT / "configs" / "compare_sd15.yaml"),
        "--common",
        '{"use_cpu": true}',
        *as_flags(prompts),
    ]
    found = read_comparison(parse_arguments([CompareArguments], flags)[0])
    assert {one.name: one.rollouts for one in found.entrants} == {
        "scores": 100, "scores, maps, words": 100, "scores, maps, words, back-propagated": 200, "PickScore": 100,
        "PickScore, maps": 100,
    }  # fmt: skip
    assert [one.name for one in found.impartial()] == ["image reward", "HPS", "CLIP score"]
    assert found.decide_by == "image reward"
    assert len({one.base for one in found.entrants}) == 1  # one base for all


def _config(folder, pipeline, **more):
    """A training's config that says more than the others'."""
    settings = json.loads(Path(write_config(folder, pipeline)).read_text())
    (folder / "own.yaml").write_text(json.dumps(settings | more))
    return str(folder / "own.yaml")


def _yaml(folder, pipeline, **changes):
    file = folder / "comparison.yaml"
    file.write_text(json.dumps(settings_of(folder, pipeline, **changes)))
    return str(file)


def test_on_a_machine_of_several_gpus_settings_are_read_as_on_the_first(tmp_path, pipeline_folder, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(os.environ["CUDA_VISIBLE_DEVICES"].split(",")))
    settings = settings_of(tmp_path, pipeline_folder, common={"use_cpu": False})
    file = tmp_path / "comparison.yaml"
    file.write_text(json.dumps(settings))
    argv = ["--config", str(file), "--report_only", "true"]
    with pytest.raises(ValueError, match="this process sees 3 GPUs"):
        main(argv)
    with pytest.raises(ValueError, match="there is nothing to report yet"):
        main([*argv, "--gpus", "2", "0"])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2"


def test_an_entrants_environment_is_its_own(tmp_path, pipeline_folder, monkeypatch):
    monkeypatch.setenv("KEPT", "before")
    other = tmp_path / "other.yaml"
    settings = json.loads(Path(write_config(tmp_path, pipeline_folder)).read_text())
    other.write_text(json.dumps(settings | {"env": {"ACCELERATE_MIXED_PRECISION": "bf16", "KEPT": "changed"}}))
    before = dict(os.environ)
    with pytest.raises(ValueError, match="'other': accelerate was told to compute in bf16"):  # as its process reads it
        comparison_of(tmp_path, pipeline_folder, entrants={"other": {"config": str(other)}})
    assert dict(os.environ) == before


@pytest.mark.parametrize(("name", "folder"), [("奖励", "奖励"), ("карта 1", "карта_1"), ("A, b!", "a_b")])
def test_names_of_any_language_are_folders(tmp_path, pipeline_folder, name, folder):
    entrants = {name: {"config": write_config(tmp_path, pipeline_folder)}}
    assert comparison_of(tmp_path, pipeline_folder, entrants=entrants).entrants[0].folder == folder


@pytest.mark.parametrize(
    ("agreement", "message"),
    [
        ({"choises": "people"}, "agreement: unknown .*choises.*choices"),
        ({"choices": "nowhere"}, "agreement: .*nowhere"),
        ({"pictures": "nowhere", "labels": ["overall"]}, "agreement: .*nowhere"),
        ({"most_pictures": 1}, "agreement: most_pictures is 1"),
    ],
)
def test_settings_of_agreement_are_looked_at_before_anything_is_run(tmp_path, pipeline_folder, agreement, message):
    flags = ["--config", _yaml(tmp_path, pipeline_folder, agreement=agreement, agreement_prompts=2)]
    with pytest.raises(ValueError, match=message):
        main(flags)
    assert not (tmp_path / "comparison").exists()


def test_models_that_changed_at_the_same_path_are_other_settings(tmp_path, pipeline_folder):
    """But those of an entrant that is left out, or added, are nothing to the others."""
    policy, other = tmp_path / "policy", tmp_path / "other"
    for copy in (policy, other):
        shutil.copytree(pipeline_folder, copy)
    config = write_config(tmp_path, str(policy))
    both = {"red": {"config": config}, "more": {"config": config, "changes": {"policy": str(other)}}}
    claim(comparison_of(tmp_path, str(policy), entrants=both))
    check_folder(comparison_of(tmp_path, str(policy), entrants={"red": both["red"]}))
    weights = load_file(file := policy / "unet/diffusion_pytorch_model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, file)
    with pytest.raises(ValueError, match=f"other settings .*weights of {re.escape(str(policy))}: "):
        check_folder(comparison_of(tmp_path, str(policy), entrants=both))


def test_agreement_that_was_measured_is_not_looked_at_again(tmp_path, pipeline_folder):
    """Its pictures may be gone by then."""
    comparison = comparison_of(tmp_path, pipeline_folder, agreement={"choices": "nowhere"}, agreement_prompts=2)
    with pytest.raises(ValueError, match=r"agreement: .*nowhere"):
        check_agreement(comparison)
    write_agreement(comparison)
    check_agreement(comparison)
