from pathlib import Path

import numpy as np
import pytest
import yaml
from parts import Task, with_needs
from selection_proof import TERMS, check_settings, make_parser, outcomes, plan, rows_of
from use_parts import TRAINED_ON, make_quick, selection
from use_training import at_home

from finetune.generate import GenerationArguments
from finetune.rule_reading import read_rules
from finetune.select import SelectArguments
from finetune.sft import SftArguments
from finetune.sft_config import SftConfig
from reward.arguments import parse_arguments, read_prompt_file


def test_pairs_are_won_lost_or_tied():
    original = np.array([[0.5, 0.5], [0.9, 0.2]])
    tuned = np.array([[0.6, 0.505], [0.8, 0.195]])
    found = outcomes(tuned, original, tie=0.01)
    assert found["tuned better"].tolist() == [0.5, 0.0]
    assert found["original better"].tolist() == [0.0, 0.5]
    assert found["tie"].tolist() == [0.5, 0.5]


REPORTS = [{"pictures": 80, "kept": 20}, {"pictures": 80, "kept": 30}]


def drawn(gain):
    return {"values": {term: np.full((40, 2), 0.5 + gain).tolist() for term in TERMS}, "diversity": [0.5] * 40}


def test_goals_are_about_the_difference_to_random_pictures():
    found = {"base": [drawn(0), drawn(0)], "chosen": [drawn(0.26), drawn(0.24)], "random": [drawn(0.1), drawn(0.1)]}
    figures = {row.name: row for row in rows_of(REPORTS, found)}
    gain = figures["satisfied, chosen - random"]
    assert (gain.value, gain.holds) == (pytest.approx(0.15), True)
    assert (figures["pictures in a pool, mean"].value, figures["pictures chosen of it, mean"].value) == (80, 25)
    assert figures["overall, chosen - base"].value == pytest.approx(0.25)
    assert figures["overall, random - base"].value == pytest.approx(0.1)
    assert figures["chosen against base: chosen better"].value == 1
    assert figures["chosen against random: random better"].value == 0
    assert figures["diversity, tuned on chosen / base"].value == pytest.approx(1)
    assert [row.name for row in figures.values() if row.goal] == ["satisfied, chosen - random",
                                                                  "overall, chosen - random"]  # fmt: skip
    found["random"] = found["chosen"]
    assert {row.name: row for row in rows_of(REPORTS, found)}["overall, chosen - random"].holds is False


@pytest.mark.parametrize("quick", [False, True])
def test_both_kinds_are_tuned_alike_on_as_many_pictures(quick, tmp_path):
    argv = ["--work", str(tmp_path), "--judged", TRAINED_ON, "--learning_rate", "0.5"]
    options, options.sft_flags = make_parser().parse_known_args(argv)
    if quick:
        make_quick(options)
    chosen = selection(2, options, options.select)
    parts = {part.name: part for part in with_needs([*plan(chosen, 33, options).values()])}

    def told(name, kinds):
        part = parts[name]
        task = Task(tmp_path / name, part.seed, part.how, [tmp_path / need.name for need in part.needs])
        return parse_arguments(kinds, [at_home(word, task) for word in part.how["command"]][2:])

    (one, settings), (other, same) = (
        told(f"SFT on {kind}", [SftArguments, SftConfig]) for kind in ("selected", "random")
    )
    assert one.data == str(tmp_path / "selection/selection/data")
    assert other.data == str(tmp_path / "selection at random/selection/data")
    differ = {name for name, value in vars(settings).items() if str(value) != str(getattr(same, name))}
    assert differ <= {"output_dir", "logging_dir"}
    assert (settings.seed, settings.learning_rate) == (2, 0.5)
    judged = parts["pictures of SFT on selected"].how["prompts"]
    assert judged == parts["pictures of base"].how["prompts"] == read_prompt_file(TRAINED_ON)[-len(judged) :]
    kinds = [SelectArguments, GenerationArguments]
    (first, pool), (second, again) = told("selection", kinds), told("selection at random", kinds)
    assert pool == again
    assert first.pictures == second.pictures == str(tmp_path / "selection/pool/pictures")
    assert read_rules(second.rules) == read_rules({"at random": {"random": 33, "seed": 2}})
    assert first.output_dir != second.output_dir
    if not quick:
        assert set(first.rules) == set(_rules_of(options.select))


def test_a_mistaken_setting_is_found_before_a_pool_is_drawn():
    options, options.sft_flags = make_parser().parse_known_args(["--seds", "1"])
    with pytest.raises(SystemExit, match="error: unknown setting on the command line: `--seds`"):
        check_settings(options)


def _rules_of(config):
    return yaml.safe_load(Path(config).read_text())["rules"]
