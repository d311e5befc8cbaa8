"""What the table's trainings are told, what its figures are, and which of them are there."""

import json

import numpy as np
import pytest
import torch
import uses
from demo_proof import TERMS
from long_runs import ROOT
from parts import Task, with_needs
from use_drawing import PICTURES, draw
from use_parts import DDPO, DRAFT_K, GUIDE, HELD_TO_REGIONS, INPAINT, POLICY, SFT_ON_SELECTED, TRAINING, VARIANTS
from use_training import at_home

from finetune import draft, select, sft
from finetune.draft_config import DraftConfig
from finetune.generate import GenerationArguments
from finetune.sft_config import SftConfig
from reward.arguments import parse_arguments
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
    text = uses.markdown(uses.page(found))
    assert len(text.splitlines()) == 2 + len(plans[0])
    assert "| mended | 1 | 0 | 0 | 50 | 0.550, +0.050 (0.050 .. 0.050) |" in text


def test_uses_that_are_not_done_are_left_out(options):
    plans = {0: uses.uses_of(0, options)}
    done = {plans[0][0].draw: result_of(plans[0][0].draw), plans[0][3].draw: result_of(plans[0][3].draw)}
    assert list(uses.figures_of(plans, done)) == ["base", "guided by the reward"]
    del done[plans[0][0].draw]
    assert uses.figures_of(plans, done) == {}


def task_of(tmp_path, by, needs=(), seed=0, **how):
    folder = tmp_path / f"{by}{seed}"
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
