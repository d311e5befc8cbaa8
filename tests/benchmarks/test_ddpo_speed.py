"""How fast ours is beside TRL's: what is compared, and the quotient. TRL itself needs libraries of its own."""

import json

import ddpo_speed
import pytest

from reward.arguments import read_prompt_file


def test_the_quotient_is_of_pictures_a_second():
    assert ddpo_speed.quotient([6.0, 6.0], [4.0, 4.0, 4.0]) == (1.5, 1.5, 1.5)
    value, low, high = ddpo_speed.quotient([5.0, 6.0, 7.0], [3.0, 4.0, 5.0])
    assert value == 1.5
    assert 1.0 <= low < value < high <= 7 / 3


def test_rows_say_where_the_seconds_of_both_are():
    theirs = [(8.0, {"network": 4.0, "decode": 1.0, "backward": 2.0})] * 2
    own = [(4.0, {"network": 2.0, "decode": 0.5, "backward": 1.0})] * 2
    rows = {row.name: row for row in ddpo_speed.rows_of(64, theirs, own)}
    assert rows["TRL, pictures a second"].value == 8.0
    assert rows["ours / TRL"].value == 2.0
    assert rows["ours / TRL"].goal == ">= 1.5"
    assert rows["models' share of ours"].value == pytest.approx(3.5 / 4)
    assert rows["TRL, seconds of everything else"].value == pytest.approx(1.0)
    assert rows["ours, seconds of backward"].value == 1.0


def test_ours_trains_every_step_of_a_pipeline_whose_last_has_noise_too(tmp_path, capsys):
    """The child's own assertion fails where a step has none."""
    ddpo_speed.ours(
        {
            "pipeline": ddpo_speed.stochastic_pipeline(tmp_path), "batch": 4, "batches": 2, "steps": 2, "rollouts": 1,
            "guidance_scale": 2.0, "threads": 1, "prompts": read_prompt_file("tinyworld/assets/prompts_train.txt")[:8],
        }
    )  # fmt: skip
    ((wall, work),) = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert set(work) == set(ddpo_speed.PARTS)
    assert 0 < min(work.values()) < sum(work.values()) < wall
