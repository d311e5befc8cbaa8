import numpy as np
import pytest
import torch
import uses
from draft_proof import (
    BY_DDPO,
    SHORTER,
    Found,
    change_outside,
    found_of,
    make_parser,
    plan,
    rows_of,
)
from parts import Task, with_needs
from use_drawing import PICTURES
from use_parts import BASE, DRAFT_K, HELD_TO_REGIONS, TRAINING
from use_training import at_home

from finetune import draft
from finetune.draft_config import DraftConfig
from reward.arguments import parse_arguments
from rl.ddpo import DDPOConfig
from run_ddpo import RunArguments


def test_change_is_counted_where_there_was_no_problem():
    """Two prompts of two pictures: the left half is the problem, the right one changes by 51, 0, 102 and 0 of 255."""
    before = np.zeros((4, 64, 64, 3), np.uint8)
    after = before.copy()
    after[:, :, :32] = 255
    after[0, :, 32:], after[2, :, 32:] = 51, 102
    region = torch.zeros(4, 1, 64, 64)
    region[..., :32] = 1
    assert change_outside(before, after, region, generations=2) == pytest.approx([0.1, 0.2])


def found(gain, change, pictures):
    """Three seeds, four prompts."""
    by_prompt = np.array([-0.02, 0.0, 0.0, 0.02])
    gains = [gain + by_prompt + 0.001 * seed for seed in (-1, 0, 1)]
    return Found({"satisfied": gains}, [np.full(4, change)] * 3, 1.0, pictures)


def test_the_goals_are_ratios_of_what_was_found():
    rows = {
        row.name: row
        for row in rows_of(
            {
                BY_DDPO: found(0.1, 0.06, 5120),
                SHORTER: found(0.09, 0.05, 1024),
                DRAFT_K: found(0.2, 0.08, 3200),
                HELD_TO_REGIONS: found(0.19, 0.02, 6400),
            }
        )
    }
    goals = {name: (row.value, row.holds) for name, row in rows.items() if row.goal}
    assert goals == {
        "pictures, a fifth / ddpo": (pytest.approx(0.2), True),
        "gain, a fifth / ddpo": (pytest.approx(0.9), False),
        "change outside, with / without the constraint": (pytest.approx(0.25), True),
        "gain, with / without the constraint": (pytest.approx(0.95), True),
    }
    assert rows[f"{DRAFT_K}: satisfied, gain"].low < 0.2 < rows[f"{DRAFT_K}: satisfied, gain"].high
    assert rows[f"{BY_DDPO}: pictures drawn for training"].value == 5120


@pytest.fixture
def options(tmp_path):
    return make_parser().parse_args(["--work", str(tmp_path)])


def settings_of(part, tmp_path):
    task = Task(tmp_path / "part", part.seed, part.how, [])
    words = [at_home(word, task) for word in part.how["command"]]
    if words[0] == "-m":
        return parse_arguments([draft.RunArguments, DraftConfig], words[2:])[1]
    return parse_arguments([RunArguments, DDPOConfig], words[1:])[1]


def test_a_fifth_is_a_fifth_and_only_the_constraint_differs(options, tmp_path):
    told = {name: settings_of(need, tmp_path) for name, part in plan(3, options).items() for need in part.needs}
    fifth, free, held = told[SHORTER], told[DRAFT_K], told[HELD_TO_REGIONS]
    per_update = fifth.per_device_train_batch_size * fifth.gradient_accumulation_steps
    of_ddpo = told[BY_DDPO].num_train_epochs * told[BY_DDPO].generation_batch_size
    assert fifth.num_train_epochs * per_update * 5 == of_ddpo
    for one, differ in ((fifth, {"num_train_epochs"}), (held, {"region_weight"})):
        assert {name for name, value in vars(one).items() if str(value) != str(getattr(free, name))} == differ


def test_parts_are_those_of_the_table_of_uses(options, tmp_path):
    """So what both commands need is done once."""
    here = {part.key for one in plan(1, options).values() for part in with_needs([one])}
    table = uses.uses_of(1, uses.make_parser().parse_args(["--work", str(tmp_path)]))
    there = {part.key for use in table for part in with_needs([use.draw])}
    alone = [part.name for one in plan(1, options).values() for part in with_needs([one]) if part.key not in there]
    assert alone == [SHORTER, f"pictures of {SHORTER}"]
    assert len(here & there) == len(here) - 2


def test_what_was_drawn_is_read_by_seed(options, tmp_path):
    """The judge's gain from the parts' results, the change from their pictures, each against its own seed's base."""
    options.prompts, region = 2, torch.zeros(4, 1, 64, 64)
    plans, done, bases = [plan(seed, options) for seed in (0, 1)], {}, []
    for seed, one in enumerate(plans):
        for name, part in one.items():
            shade, value = (51 * seed, 0.5) if name == BASE else (51 * seed + 25 * (seed + 1), 0.5 + 0.1 * (seed + 1))
            part.folder(tmp_path).mkdir(parents=True)
            np.savez(part.folder(tmp_path) / PICTURES, pictures=np.full((4, 64, 64, 3), shade, np.uint8))
            done[part] = {
                "values": {"satisfied": [[value, value]] * 2},
                "diversity": [0.4 if name == BASE else 0.2] * 2,
            }
            done |= {need: {"pictures": 512} for need in part.needs if need.script == TRAINING}
        bases.append((np.full((4, 64, 64, 3), 51 * seed, np.uint8), region))
    one = found_of(SHORTER, plans, done, bases, tmp_path, terms=("satisfied",))
    assert [gain.tolist() for gain in one.gains["satisfied"]] == [pytest.approx([0.1, 0.1]), pytest.approx([0.2, 0.2])]
    assert [change.tolist() for change in one.changes] == [
        pytest.approx([25 / 255] * 2), pytest.approx([50 / 255] * 2),
    ]  # fmt: skip
    assert (one.diversity, one.pictures) == (pytest.approx(0.5), 512)
