"""One training is one file: done once, under its settings' name; and what is looked at is what was trained."""

import json
from dataclasses import asdict, replace

import pytest
import trainings
from long_runs import Budget, write_json
from trainings import Result, Training, finish

from finetune.fingerprints import code

TINY = {
    "reward": "tests.rl.toy_rewards:Redness", "reward_kwargs": {}, "num_inference_steps": 3, "train_steps": [1],
    "num_train_epochs": 2, "generation_batch_size": 2, "num_generations": 2, "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1, "share_noise": "none", "learning_rate": 1e-2,
}  # fmt: skip


def result(judge=(0.5, 0.6), wall=1.0):
    looks = {
        "rollouts": [0, 1], "pictures": [0, 8], "seconds": [0, 1], "judge": [[value] * 2 for value in judge],
        "satisfied": [[0, 1]] * 2, "reward": [0, 1], "evaluated": [{}, {}],
    }  # fmt: skip
    return {"wall": wall, "looks": looks, "watched": []}


@pytest.fixture
def started(monkeypatch):
    """Trainings that take no time; which ones were started, in order."""
    names = []

    def start(training, work):
        names.append(training.name)
        if training.name != "fails":
            write_json(work / training.file, result())
        return training.name != "fails"

    monkeypatch.setattr(trainings, "start", start)
    return names


def test_other_settings_are_another_file():
    one = Training("Paid, unit", 3, {"learning_rate": 1e-3})
    assert one.file == Training("Paid, unit", 3, {"learning_rate": 1e-3}).file
    assert one.file.startswith("paid_unit-seed3-")
    others = [replace(one, changes={"learning_rate": 2e-3}), replace(one, seed=4), replace(one, every=1)]
    assert len({other.file for other in [one, *others]}) == 4


def test_what_the_config_says_anyway_is_the_same_file(tmp_path):
    """So a config may be commented anew, and hours of work are still found."""
    config = tmp_path / "config.yaml"
    config.write_text("learning_rate: 1.0e-3\noutput_dir: here\n")
    one = Training("a", 0, {"credit": "mask"}, config=str(config))
    name = one.file
    config.write_text("# A comment.\noutput_dir: there\nlearning_rate: 1.0e-3\n")
    assert one.file == name == replace(one, changes={"credit": "mask", "learning_rate": 1e-3}).file
    config.write_text("learning_rate: 2.0e-3\n")
    assert one.file != name


def test_what_is_done_is_not_done_again(tmp_path, started):
    planned = [Training(name, 0) for name in "abc"]
    write_json(tmp_path / planned[1].file, result())
    found = finish(planned, tmp_path, jobs=1, budget=Budget(None))
    assert started == ["a", "c"]
    assert list(found) == planned
    assert found[planned[0]].gain == pytest.approx(0.1)
    assert not list(tmp_path.glob("*.part"))


def test_the_budget_leaves_out_what_would_end_too_late(tmp_path, started, monkeypatch):
    now = iter(range(0, 1000, 10))  # every look at the clock takes 10 s: a training, 10 to 20
    monkeypatch.setattr(trainings.time, "monotonic", lambda: next(now))
    planned = [Training(str(name), 0) for name in range(20)]
    found = finish(planned, tmp_path, jobs=1, budget=Budget(2))
    assert 2 <= len(started) < 6
    assert [training.name for training in found] == started
    assert not finish(planned[10:], tmp_path, jobs=1, budget=Budget(-1))


def test_a_training_that_fails_costs_no_other(tmp_path, started):
    planned = [Training("fails", 0), Training("later", 0)]
    with pytest.raises(SystemExit, match="fails, seed 0"):
        finish(planned, tmp_path, jobs=1, budget=Budget(None))
    assert started == ["fails", "later"]
    failures = []
    assert list(finish(planned, tmp_path, 1, Budget(None), failures)) == planned[1:]
    assert failures == ["a training failed: fails, seed 0; its error stands above"]


def test_a_training_is_looked_at_before_between_and_behind(tmp_path):
    """The real thing, on the small world's pipeline, as few of everything as there can be."""
    training = Training("tiny", 0, TINY | {"watch_reward": "judge"}, count=2, every=1, evaluated=3)
    done = trainings.train(training)
    write_json(tmp_path / training.file, done)
    found = Result.read(tmp_path / training.file)
    assert json.loads((tmp_path / training.file).read_text())["training"] == asdict(training)
    assert done["by"]["code"] == code()
    assert found.rollouts.tolist() == [0, 1, 2]
    assert found.pictures.tolist() == [0, 2, 4]
    assert found.seconds[0] == 0
    assert (found.seconds[1:] > found.seconds[:-1]).all()
    assert found.judge.shape == found.satisfied.shape == (3, 2)
    assert found.reward[0] != found.reward[2]
    assert [{name: len(values) for name, values in one.items()} for one in found.evaluated] == [
        {"reward": 3, "held_out": 3}
    ] * 3
    assert found.evaluated[0] != found.evaluated[2]
    assert len(found.watched) == 2
    assert all({"reward", "kl", "drawn", "dead_groups"} <= set(measured) for measured in found.watched)
    assert found.watched[0]["kl"] == 0 < found.watched[1]["kl"]


def test_the_first_look_is_at_the_base_whatever_the_seed(tmp_path, monkeypatch):
    """So trainings share it."""
    looked, evaluate = [], trainings.evaluate
    monkeypatch.setattr(trainings, "evaluate", lambda *args, **how: looked.append(1) or evaluate(*args, **how))
    changes = TINY | {"num_train_epochs": 1}
    one = trainings.train(Training("tiny", 0, changes, count=2))
    assert len(looked) == 2
    for seed in (1, 2):
        other = trainings.train(Training("tiny", seed, changes | {"learning_rate": 1e-3 * seed}, count=2), tmp_path)
        for name in ("judge", "satisfied", "reward"):
            assert one["looks"][name][0] == other["looks"][name][0]
        assert one["looks"]["reward"][-1] != other["looks"]["reward"][-1]
    assert len(looked) == 2 + 3
    assert len(list(tmp_path.glob("base-*.json"))) == 1


def test_another_base_is_looked_at_by_itself():
    one = Training("a", 0, {"learning_rate": 1e-3})
    assert replace(one, name="b", seed=1, changes={"learning_rate": 2e-3, "credit": "mask"}, every=1).base_file == (
        one.base_file
    )
    others = [replace(one, changes={"guidance_scale": 2}), replace(one, changes={"reward": "a:B"}),
              replace(one, count=8), replace(one, judged="other.txt"), replace(one, evaluated=8),
              replace(one, changes={"watch_reward": "judge"})]  # fmt: skip
    assert len({other.base_file for other in [one, *others]}) == 7


def test_a_run_is_evaluated_on_prompts_that_the_judge_is_not_asked_about(monkeypatch):
    asked = []
    monkeypatch.setattr(trainings.Looks, "look", lambda self: asked.append((set(self.prompts), set(self.evaluated))))
    trainings.train(Training("tiny", 0, TINY | {"num_train_epochs": 1}, count=96, evaluated=96))
    assert [len(prompts) for prompts in asked[0]] == [96, 96]
    assert not set.intersection(*asked[0])
