"""What the table's trainings are told, what its figures are, and which of them are there."""

import json

import draft_proof
import numpy as np
import pytest
import selection_proof
import torch
import use_drawing
import uses
import yaml
from demo_proof import TERMS
from diffusers import StableDiffusionPipeline
from long_runs import ROOT
from parts import Task, with_needs
from peft import LoraConfig, get_peft_model_state_dict
from use_drawing import PICTURES, draw
from use_parts import (
    BY_DDPO,
    DDPO,
    DRAFT_K,
    GUIDE,
    HELD_OUT,
    HELD_TO_REGIONS,
    INPAINT,
    POLICY,
    SFT_ON_SELECTED,
    TRAINING,
    VARIANTS,
)
from use_training import RUN, at_home
from uses import at_guidance, trained_at_guidance

from finetune import draft, select, sft
from finetune.draft_config import DraftConfig
from finetune.generate import GenerationArguments
from finetune.guide import prepare
from finetune.sft_config import SftConfig
from reward.arguments import parse_arguments, read_prompt_file
from reward.feedback import Reward
from rl.ddpo import DDPOConfig
from run_ddpo import RunArguments

PARTS = {
    "run_ddpo.py": [RunArguments, DDPOConfig],
    "finetune.draft": [draft.RunArguments, DraftConfig],
    "finetune.select": [select.SelectArguments, GenerationArguments],
    "finetune.sft": [sft.SftArguments, SftConfig],
}


@pytest.fixture
def options(tmp_path):
    return uses.make_parser().parse_args(["--work", str(tmp_path)])


@pytest.mark.parametrize("quick", [False, True])
def test_every_training_is_taken_by_its_command(options, quick, tmp_path):
    if quick:
        options.only = [use.name for use in uses.uses_of(3, options) if "best of" not in use.name]
        uses.make_quick(options)
    plan = uses.uses_of(3, options)
    commands = {}
    for part in with_needs([use.draw for use in plan]):
        if part.script != TRAINING:
            continue
        task = Task(tmp_path / part.name, part.seed, part.how, [tmp_path / need.name for need in part.needs])
        words = [at_home(word, task) for word in part.how["command"]]
        name, flags = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
        *_, args = commands[part.name] = parse_arguments(PARTS[name], flags)
        assert args.seed == 3
    assert commands["DDPO, credit mask"][1].credit == "mask"
    assert commands["SFT on selected, then DDPO"][1].init_adapter == str(tmp_path / "SFT on selected/run")
    assert commands["SFT on selected"][0].data == str(tmp_path / "selection/selection/data")
    assert commands["SFT on selected"][1].tune == "lora"  # or DDPO could not start from it
    assert commands[HELD_TO_REGIONS][1].region_weight > 0
    scales = {name: args.guidance_scale for name, (_, args) in commands.items() if hasattr(args, "guidance_scale")}
    assert {name for name, scale in scales.items() if scale == 2} == {trained_at_guidance(DRAFT_K)}
    assert {commands[name][1].variant for name in VARIANTS} == {
        "draft",
        "draft_k",
        "draft_lv",
        "alignprop",
        "refl",
    }
    pictures = {name: args.num_train_epochs * args.per_device_train_batch_size * args.gradient_accumulation_steps
                for name, (_, args) in commands.items() if name in VARIANTS}  # fmt: skip
    assert len(set(pictures.values())) == 1


def test_some_lines_only(options):
    options.only = ["DDPO, credit scalar"]
    assert [use.name for use in uses.uses_of(0, options)] == ["base", "DDPO, credit scalar"]
    options.only = ["DDPO"]
    with pytest.raises(SystemExit, match="there is no use 'DDPO'; there are base, classifier-free guidance 2"):
        uses.uses_of(0, options)
    uses.make_quick(options := uses.make_parser().parse_args(["--work", str(options.work)]))
    kinds = {part.name for part in with_needs([use.draw for use in uses.uses_of(0, options)])}
    assert {DRAFT_K, "DDPO, credit scalar", "selection", SFT_ON_SELECTED, "SFT on selected, then DDPO"} <= kinds


def test_one_seed_of_everything_comes_first_and_shares_its_noise(options):
    plans = {seed: uses.uses_of(seed, options) for seed in (0, 1)}
    parts = with_needs([use.draw for plan in plans.values() for use in plan])
    seeds = [part.seed for part in parts]
    assert seeds == sorted(seeds)
    assert len({part.key for part in parts}) == len(parts)
    by_name = {use.name: use for use in plans[0]}
    assert by_name["mended"].trainings == []
    assert [part.name for part in by_name["SFT on selected, then DDPO"].trainings] == [
        "selection", SFT_ON_SELECTED, "SFT on selected, then DDPO",
    ]  # fmt: skip
    best = by_name["DRaFT-K, best of 4"]
    assert best.trainings == by_name[DRAFT_K].trainings
    assert best.draw.how["tuned"]
    assert not by_name["mended"].draw.how["tuned"]


def result_of(part, gain=0.0):
    if part.script == TRAINING:
        return {"pictures": 100, "seconds": 10.0, "wall": 1.0}
    values = {term: np.full((4, 2), 0.5 + gain).tolist() for term in TERMS}
    return {"values": values, "diversity": [0.2, 0.4, 0.2, 0.4], "ms": 50.0, "wall": 1.0}


def test_gains_are_over_the_base_of_the_same_seeds_and_costs_are_of_all_steps(options):
    plans = {seed: uses.uses_of(seed, options) for seed in (0, 1)}
    done = {}
    for seed, plan in plans.items():
        for use in plan:
            for part in with_needs([use.draw]):
                done[part] = result_of(part, 0.1 * seed + (0.05 if part.name != "pictures of base" else 0))
    for use in plans[1]:  # of the second seed only the base is there, and it says nothing of the others' gains
        if use.name != "base":
            del done[use.draw]
    found = uses.figures_of(plans, done)
    rows = {row.name: row for row in uses.rows_of(found)}
    assert rows["base: satisfied"].value == pytest.approx(0.55)
    assert rows["base: satisfied"].n == 2
    gained = rows["mended: satisfied, gain"]
    assert (gained.value, gained.low, gained.high, gained.n) == (pytest.approx(0.05),) * 3 + (1,)
    assert rows["mended: diversity, of the base's"].value == pytest.approx(1)
    assert rows["mended: pictures drawn for training"].value == 0
    assert rows["SFT on selected, then DDPO: pictures drawn for training"].value == 300
    assert rows["SFT on selected, then DDPO: seconds of training"].value == 30
    text = uses.markdown(uses.tables(found))
    first = text[: text.index("At guidance 2")]
    assert len(first.splitlines()) == 5 + len(plans[0])
    assert "| mended | 1 | 0 | 0 | 50 | 0.550, +0.050 (0.050 .. 0.050) |" in first
    assert first.count("| 1.00 (1.00 .. 1.00) |\n") == len(plans[0]) - 1


def test_lines_at_guidance_are_told_against_guidance_alone(options):
    plans = {seed: uses.uses_of(seed, options) for seed in (0, 1)}
    names = [use.name for use in plans[0] if use.rival]
    others = ("best of 4", "guided by the reward", "mended", DRAFT_K, BY_DDPO, SFT_ON_SELECTED)
    assert names == [*map(at_guidance, others), trained_at_guidance(DRAFT_K)]
    done = {}
    for plan in plans.values():
        for use in plan:
            for part in with_needs([use.draw]):
                gain = 0.0 if part.name == "pictures of base" else 0.25 if "at guidance" in part.name else 0.2
                done[part] = result_of(part, gain)
            if "guidance 2" in use.name:
                assert use.draw.how["guidance"] == 2
    mended = next(use for use in plans[0] if use.name == "mended, at guidance 2")
    assert [part.name for part in mended.draw.needs] == ["pictures of classifier-free guidance 2"]
    del done[next(use for use in plans[1] if use.name == uses.RIVAL).draw]  # a seed without it says nothing of gains
    found = uses.figures_of(plans, done)
    rows = {row.name: row for row in uses.rows_of(found)}
    for name in names:
        assert rows[f"{name}: satisfied, gain"].value == pytest.approx(0.25)
        over = rows[f"{name}: satisfied, gain over classifier-free guidance 2"]
        assert (over.value, over.n) == (pytest.approx(0.05), 1)
        assert rows[f"{name}: diversity, of that of classifier-free guidance 2"].value == pytest.approx(1)
    assert sum("gain over" in name for name in rows) == len(names) * len(TERMS)
    shown = uses.tables(found)
    assert [line[0] for line in shown["at guidance 2: gains over classifier-free guidance 2"]] == [uses.RIVAL, *names]
    text = uses.markdown(shown)
    assert text.count("| mended, at guidance 2 | 1 | 0 | 0 | 50 | 0.750, +0.250 (0.250 .. 0.250) |") == 1
    assert text.count("| mended, at guidance 2 | 1 | 0 | 0 | 50 | 0.750, +0.050 (0.050 .. 0.050) |") == 1
    options.only = ["mended, at guidance 2"]
    assert [use.name for use in uses.uses_of(0, options)] == ["base", uses.RIVAL, "mended, at guidance 2"]


def test_prompts_are_the_last_ones(options):
    every = read_prompt_file(HELD_OUT)
    assert uses.uses_of(0, options)[0].draw.how["prompts"] == every[-192:] == every[64:]
    options.prompts = 5
    assert {tuple(use.draw.how["prompts"]) for use in uses.uses_of(0, options)} == {tuple(every[-5:])}
    options.prompts = 1000
    assert uses.uses_of(0, options)[0].draw.how["prompts"] == every


@pytest.mark.parametrize("module", [uses, draft_proof, selection_proof])
@pytest.mark.parametrize("flag", ["--prompts", "--generations"])
def test_counts_without_interval_or_diversity_are_refused_at_once(module, flag, capsys):
    with pytest.raises(SystemExit):
        module.make_parser().parse_args([flag, "1"])
    assert f"{flag}: 1 is too few; it must be at least 2" in capsys.readouterr().err
    assert vars(module.make_parser().parse_args([flag, "2"]))[flag[2:]] == 2


def test_the_page_has_its_folder_made_and_comes_after_the_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(uses, "finish", lambda parts, *_, failures: {part: result_of(part) for part in parts})
    page, figures = tmp_path / "new" / "page.md", tmp_path / "uses.json"
    argv = ["uses.py", "--work", str(tmp_path / "work"), "--seeds", "1", "--json", str(figures), "--page", str(page)]
    monkeypatch.setattr("sys.argv", argv)
    uses.main()
    assert page.read_text().startswith("# Every use of the predictor side by side")
    assert "\nGains over the base:\n\n| use |" in page.read_text()
    figures.unlink()
    page.unlink()
    page.mkdir()  # cannot be written
    with pytest.raises(IsADirectoryError):
        uses.main()
    assert figures.is_file()


def test_uses_that_are_not_done_are_left_out(options):
    plans = {0: uses.uses_of(0, options)}
    done = {plans[0][0].draw: result_of(plans[0][0].draw), plans[0][3].draw: result_of(plans[0][3].draw)}
    assert list(uses.figures_of(plans, done)) == ["base", "guided by the reward"]
    del done[plans[0][0].draw]
    assert uses.figures_of(plans, done) == {}


def task_of(tmp_path, by, needs=(), seed=0, **how):
    folder = tmp_path / f"{by}{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    told = {"by": by, "policy": POLICY, "prompts": ["a red circle", "a blue square"],
            "generations": 2, "tuned": False, "config": None, **how}  # fmt: skip
    return Task(folder, seed, told, needs)


def pictures(task):
    return np.load(task.folder / PICTURES)["pictures"]


@pytest.fixture
def base(tmp_path):
    task = task_of(tmp_path, "plain")
    (task.folder / "part.json").write_text(json.dumps(draw(task)))
    return task


def test_pictures_of_every_use_start_from_the_bases_noise(tmp_path, base, monkeypatch):
    """So with nothing to choose, no push and nothing to mend, they are the base's."""
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    one = task_of(tmp_path, "best_of", config=DDPO, count=1)
    assert draw(one)["values"] == json.loads((base.folder / "part.json").read_text())["values"]
    assert np.array_equal(pictures(one), pictures(base))
    still = tmp_path / "still.yaml"
    still.write_text((ROOT / GUIDE).read_text().replace("scale: 0.1", "scale: 0.0"))
    guided = task_of(tmp_path, "guide", config=str(still))
    draw(guided)
    assert np.abs(pictures(guided).astype(int) - pictures(base)).max() <= 1
    none = tmp_path / "none.yaml"
    none.write_text((ROOT / INPAINT).read_text().replace("implausibility: 0.2}", "implausibility: 1.0}"))
    mended = task_of(tmp_path, "inpaint", [base.folder], config=str(none))
    said = draw(mended)
    assert np.array_equal(pictures(mended), pictures(base))
    assert said["ms"] > json.loads((base.folder / "part.json").read_text())["ms"]


def changed(config, path, **settings):
    """A config with some of its settings changed."""
    path.write_text(yaml.safe_dump(yaml.safe_load((ROOT / config).read_text()) | settings))
    return str(path)


def drawn(task):
    """What a use draws, not judged."""
    captions = [prompt for prompt in task.how["prompts"] for _ in range(task.how["generations"])]
    work = getattr(use_drawing, task.how["by"])(task, captions)
    next(work)
    return next(work)


def differ(some, others):
    """By more than rounding."""
    return np.abs(some.astype(int) - others).max() > 8


def test_pictures_of_every_use_are_other_ones_where_it_acts(tmp_path, base):
    assert differ(drawn(task_of(tmp_path, "guide", config=GUIDE)), pictures(base))
    eager = {"thresholds": {"implausibility": 0.01}, "min_gain": 0.0, "max_area": 1.0}
    config = changed(INPAINT, tmp_path / "eager.yaml", **eager)
    assert differ(drawn(task_of(tmp_path, "inpaint", [base.folder], config=config)), pictures(base))


@pytest.mark.parametrize("by", ["plain", "best_of", "guide"])
def test_a_lora_and_classifier_free_guidance_change_what_is_drawn(by, tmp_path):
    """Of a use that does nothing else."""
    still = changed(GUIDE, tmp_path / "still.yaml", scale=0.0)
    how = {"plain": {}, "best_of": {"config": DDPO, "count": 1}, "guide": {"config": still}}[by]
    without = drawn(task_of(tmp_path, by, **how))
    assert differ(drawn(task_of(tmp_path, by, guidance=2.0, **how)), without)
    pipeline = StableDiffusionPipeline.from_pretrained(ROOT / POLICY, safety_checker=None)
    torch.manual_seed(0)
    pipeline.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = get_peft_model_state_dict(pipeline.unet)
    pipeline.save_lora_weights(tmp_path / "tuned" / RUN, unet_lora_layers=layers)
    assert differ(drawn(task_of(tmp_path, by, [tmp_path / "tuned"], tuned=True, **how)), without)


def test_mending_draws_with_the_guidance_of_the_pictures(tmp_path, base):
    eager = {"thresholds": {"implausibility": 0.01}, "min_gain": 0.0, "max_area": 1.0}
    how = {"needs": [base.folder], "config": changed(INPAINT, tmp_path / "eager.yaml", **eager)}
    assert differ(*(drawn(task_of(tmp_path, "inpaint", guidance=scale, **how)) for scale in (1.0, 2.0)))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' DPM++ on a new NumPy
def test_guidance_follows_every_setting_of_its_config(tmp_path, monkeypatch):
    def by(**settings):
        settings = {"scale": 0.0} | settings
        return drawn(task_of(tmp_path, "guide", config=changed(GUIDE, tmp_path / "other.yaml", **settings)))

    without = by()
    assert differ(by(scheduler="dpmpp", eta=0.0), by(eta=0.0))
    led = by(guidance_scale=2.0)
    assert differ(led, without)
    assert differ(by(guidance_scale=2.0, negative_prompt="a red circle"), led)
    assert by(resolution=128).shape == (4, 128, 128, 3)
    runs = []
    monkeypatch.setattr("use_drawing.prepare", lambda run: runs.append(prepare(run)) or runs[-1])
    by(activation_checkpointing=True)
    assert runs[0].unet.is_gradient_checkpointing


def test_the_best_of_several_is_chosen_by_the_reward(tmp_path, base, monkeypatch):
    class Dark:
        def __call__(self, images, prompts):
            return Reward(total=-images.mean(dim=(1, 2, 3)))

    monkeypatch.setattr("use_drawing.RichReward", lambda **settings: Dark())
    best = task_of(tmp_path, "best_of", config=DDPO, count=3)
    draw(best)
    mean = pictures(best).mean(axis=(1, 2, 3))
    assert (mean <= pictures(base).mean(axis=(1, 2, 3))).all()
    assert (mean < pictures(base).mean(axis=(1, 2, 3))).any()
