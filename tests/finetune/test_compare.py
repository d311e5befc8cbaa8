"""The command itself: trains, is killed, goes on, and says what failed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

import run_ddpo
from finetune.agreement import AgreementArguments
from finetune.compare.__main__ import main
from finetune.compare.agreement import agreement_command, agreement_rewards
from finetune.compare.entrants import parse_entrant, run_flags
from finetune.compare.evaluate import EvaluationJob, Findings, Look, looks_of, run_job
from finetune.compare.facts import TrainingFacts
from finetune.compare.folder import run_findings, run_folder
from finetune.compare.rewards import Spec
from finetune.compare.runs import last_words
from finetune.generate import GenerationArguments
from reward.arguments import parse_arguments
from reward.folder_lock import FolderInUseError, check_free, taken
from tests.finetune.compare_case import (
    HELD_OUT,
    JUDGE,
    PLAIN,
    REDNESS,
    STEADY,
    TRAIN,
    comparison_of,
    settings_of,
    write_config,
    write_draft_config,
)
from tests.test_house import ROOT

FAILS = "tests.finetune.compare_case:FailsAt"


def wait_until_free(folder, end):
    """Processes that were killed with the command hold its lock until they are gone, a moment later than it."""
    while time.monotonic() < end:
        with contextlib.suppress(FolderInUseError):
            return check_free(folder)
        time.sleep(0.02)


def test_killed_gone_on_with_and_a_reward_that_fails_half_way(tmp_path, pipeline_folder, capsys):
    config = write_config(tmp_path, pipeline_folder)
    settings = settings_of(
        tmp_path, pipeline_folder, seeds=[0], budget_images=16, looks=2, jobs=2, agreement_prompts=2,
        agreement_generations=2, evaluators={"blue": JUDGE, "redness": REDNESS},
        entrants={
            "red": {"config": config},
            "breaks": {"config": config, "changes": {"reward": FAILS, "reward_kwargs": {"prompt": TRAIN[3]}}},
            "back-propagation": {"command": "finetune.draft", "config": write_draft_config(tmp_path, pipeline_folder)},
        },
    )  # fmt: skip
    file = tmp_path / "comparison.yaml"
    file.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "finetune.compare", "--config", str(file)]
    folder = tmp_path / "comparison"

    killed = subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 240
    while not list(folder.glob("runs/*/*/checkpoint-*/complete.json")) and time.monotonic() < end:
        assert killed.poll() is None
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    wait_until_free(folder, end)
    base = next(folder.glob("base/*/findings.json"))
    began = {path: path.stat().st_mtime_ns for path in [base, *folder.glob("runs/*/*/checkpoint-*/complete.json")]}
    assert len(began) > 1
    assert not (folder / "report.html").exists()

    with pytest.raises(SystemExit) as ended:
        main(command[3:])
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert "failed: breaks, seed 0: training: RuntimeError: the scorer's licence has expired" in said.err
    assert "No verdict yet: of 1 seed" in said.out
    report = json.loads((folder / "report.json").read_text())
    rows = {row["name"]: row for row in report["entrants"]}
    red, breaks, drafted = (rows[name] for name in ("red", "breaks", "back-propagation"))
    assert (red["seeds"], red["images"], breaks["seeds"]) == ([0], 16, [])
    assert breaks["unfinished"].startswith("seed 0: training failed, RuntimeError: the scorer's licence has expired")
    assert [flag["kind"] for flag in breaks["flags"]] == ["failed"]
    assert report["failures"][0]["entrant"] == "breaks"
    assert report["agreement"]["pictures"] == 4
    assert red["gains"]["redness"]["value"] != 0  # four updates teach little, but they were made
    assert {path: path.stat().st_mtime_ns for path in began} == began  # nothing is done again
    assert (drafted["seeds"], drafted["images"]) == ([0], 16)
    assert drafted["gains"]["redness"]["value"] != 0
    assert drafted["kl"] is None  # which is measured only where it holds something back
    assert drafted["command"].startswith("python -m finetune.draft --config ")
    found = folder / "runs" / "red" / "seed0" / "findings.json"
    assert [(seen.look.updates, seen.look.images) for seen in Findings.read(found).seen] == [(2, 8), (4, 16)]

    with pytest.raises(SystemExit) as ended:  # why it failed is kept
        main([*command[3:], "--report_only", "true"])
    assert ended.value.code == 1
    again = json.loads((folder / "report.json").read_text())
    assert (again["failures"], again["verdict"]) == (report["failures"], report["verdict"])

    # What is there is not made again; what failed is tried again.
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("findings.json")}
    main([*command[3:], "--only", "red"])
    assert "1 of 1 trainings are there already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("findings.json")} == stamps

    with taken(folder), pytest.raises(FolderInUseError, match="in use by another run"):
        main(command[3:])


def test_every_policy_draws_from_the_same_noise(tmp_path, pipeline_folder):
    """An untrained adapter's pictures are the base's, whichever reward comes first, to the last digit kept."""
    comparison = comparison_of(tmp_path, pipeline_folder)
    red, plain = comparison.entrants[:2]
    found = []
    for number, (entrant, specs) in enumerate([(red, comparison.specs()), (plain, comparison.specs()[::-1])]):
        flags = run_flags(comparison, entrant, 0, tmp_path / "unused")
        out = str(tmp_path / str(number) / "findings.json")
        named = [spec.named for spec in specs]
        job = EvaluationJob(entrant.command, flags, [Look(None)], named, comparison.held_out, 2, 0, out)
        job.write(tmp_path / "job.json")
        run_job(EvaluationJob.read(tmp_path / "job.json"))
        found.append(Findings.read(tmp_path / str(number) / "findings.json").seen[0])
    assert found[0].values == found[1].values
    assert found[0].diversity == found[1].diversity
    judge = next(one.spec for one in comparison.evaluators if one.name == "satisfied")
    assert set(found[0].values[judge.key]) == {"", "satisfied"}
    out = tmp_path / "0" / "findings.json"  # a reward that is asked later is added, and all else stays
    later = Spec.of(STEADY)
    run_job(EvaluationJob(red.command, flags, [Look(None)], [later.named], comparison.held_out, 2, 0, str(out)))
    after = Findings.read(out).seen[0]
    assert after.values == {**found[0].values, later.key: {"": [[0.0, 0.0]] * len(comparison.held_out)}}
    table = [json.loads(line) for line in (tmp_path / "0" / "pictures" / "metadata.jsonl").read_text().splitlines()]
    assert [line["text"] for line in table] == list(comparison.held_out)
    assert all((tmp_path / "0" / "pictures" / line["file_name"]).is_file() for line in table)


def test_an_evaluator_that_fails_at_a_picture_costs_no_other_one(tmp_path, pipeline_folder):
    """Nor what it had said: it is left out whole."""
    comparison = comparison_of(tmp_path, pipeline_folder)
    red, out = comparison.entrants[0], tmp_path / "findings.json"
    flags = [*run_flags(comparison, red, 0, tmp_path / "unused"), "--per_device_eval_batch_size", "2"]
    fails = Spec.of(FAILS, {"prompt": HELD_OUT[3]})

    def judge(*specs):
        looks = [Look(None), Look(None, 1)]
        named = [spec.named for spec in specs]
        run_job(EvaluationJob(red.command, flags, looks, named, comparison.held_out, 2, 0, str(out)))
        return Findings.read(out)

    alone = judge(red.spec)
    found = judge(fails, red.spec)
    assert found.failed == {fails.key: "RuntimeError: the scorer's licence has expired"}
    assert [list(seen.values) for seen in found.seen] == [[red.spec.key]] * 2
    assert [seen.values for seen in found.seen] == [seen.values for seen in alone.seen]
    out.unlink()
    with pytest.raises(ValueError, match="licence has expired"):
        judge(fails)
    assert not out.exists()


def checkpoints(folder, updates):
    for update in updates:
        place = folder / f"checkpoint-{update}"
        place.mkdir(parents=True)
        marker = {"global_step": update, "rollouts": update, "processor_seconds": 2.0 * update, "train_seconds": 9.0}
        (place / "complete.json").write_text(json.dumps(marker))


def test_looks_are_evenly_spread_and_the_end_is_among_them(tmp_path):
    checkpoints(tmp_path, range(1, 8))
    looks = looks_of(tmp_path, pictures=4, most=3, on_cpu=True)
    assert [look.updates for look in looks] == [3, 5, 7]
    assert [(look.images, look.seconds) for look in looks] == [(12, 6), (20, 10), (28, 14)]
    assert looks[-1].adapter == str(tmp_path)  # what the run leaves
    assert looks[0].adapter == str(tmp_path / "checkpoint-3")
    assert looks_of(tmp_path, 4, most=3, on_cpu=False)[0].seconds == 9
    assert len(looks_of(tmp_path, 4, most=99, on_cpu=True)) == 7


def test_checkpoints_of_a_stop_are_not_looked_at(tmp_path):
    """Or the looks of seeds that were stopped would lie elsewhere than those of the others."""
    checkpoints(tmp_path, (4, 7, 8, 12, 16, 19, 20))
    assert [look.updates for look in looks_of(tmp_path, 4, 5, on_cpu=True, every=4)] == [4, 8, 12, 16, 20]
    checkpoints(tmp_path, (21,))  # where time decides, the end is where it is
    assert [look.updates for look in looks_of(tmp_path, 4, 99, on_cpu=True, every=4)] == [4, 8, 12, 16, 20, 21]


def test_a_training_ends_when_its_time_is_up(tmp_path, pipeline_folder):
    """With a checkpoint there, and the seconds in it."""
    comparison = comparison_of(tmp_path, pipeline_folder, budget_images=None, budget_seconds=1e-3)
    entrant = comparison.entrants[0]
    folder = run_folder(comparison, entrant, 0)
    run_ddpo.main(run_flags(comparison, entrant, 0, folder))
    (look,) = looks_of(folder, entrant.pictures, 5, on_cpu=True)
    assert (look.updates, look.images) == (1, 4)
    assert look.seconds >= 1e-3
    assert (folder / "finished.json").is_file()
    facts = TrainingFacts.read(folder)
    assert facts.kl == 0  # of the policy that drew the first rollout
    assert facts.wall_seconds > 0
    assert facts.monitors == []


def test_every_look_falls_on_a_checkpoint(tmp_path, pipeline_folder):
    """Rollouts that five looks do not divide are looked at less often."""
    comparison = comparison_of(tmp_path, pipeline_folder, budget_images=4 * 6, looks=5)
    flags = run_flags(comparison, comparison.entrants[0], 3, tmp_path)
    _, args = parse_entrant("run_ddpo", flags)
    assert (args.num_train_epochs, args.save_steps, args.save_total_limit, args.seed) == (6, 2, 0, 3)
    assert run_findings(comparison, comparison.entrants[0], 3).parent.name == "seed3"


def test_agreement_is_asked_by_its_own_command(tmp_path, pipeline_folder):
    def parsed(**agreement):
        found = comparison_of(tmp_path, pipeline_folder, agreement=agreement)
        command = agreement_command(found, agreement_rewards(found))
        return parse_arguments([AgreementArguments, GenerationArguments], command[1:])

    arguments, drawing = parsed(choices="pairs")
    assert arguments.rewards == {
        "satisfied": {"reward": JUDGE, "kwargs": {}, "term": "satisfied"}, "blue": {"reward": JUDGE, "kwargs": {}},
        "redness": {"reward": REDNESS, "kwargs": {}}, "plain": {"reward": PLAIN, "kwargs": {}},
    }  # fmt: skip
    assert arguments.against == ["satisfied"]
    assert (arguments.choices, drawing.policy, drawing.num_inference_steps) == ("pairs", pipeline_folder, 2)
    arguments, drawing = parsed(pictures="rated", labels=["overall"])
    assert (arguments.pictures, arguments.against, drawing.policy) == ("rated", ["satisfied", "overall"], None)


def test_every_reward_is_asked_by_a_name_of_its_own(tmp_path, pipeline_folder):
    """An entrant may be called like an evaluator, and members of sums like those of others."""
    config = write_config(tmp_path, pipeline_folder)
    mixture = {"red": {"reward": REDNESS, "kwargs": {"weight": 2.0}}, "plain": {"reward": PLAIN}}
    entrants = {
        "satisfied": {"config": config}, "mixed": {"config": config, "changes": {"rewards": mixture}},
        "mixed: red": {"config": config, "changes": {"reward": JUDGE}},
    }  # fmt: skip
    evaluators = {"satisfied": {"reward": JUDGE, "term": "satisfied"}, "steady": STEADY}
    found = comparison_of(tmp_path, pipeline_folder, entrants=entrants, evaluators=evaluators)
    rewards = agreement_rewards(found)
    assert {name: (entry["reward"], entry.get("term")) for name, entry in rewards.items()} == {
        "satisfied": (JUDGE, "satisfied"), "steady": (STEADY, None), "satisfied (trained on)": (REDNESS, None),
        "mixed: red": (REDNESS, None), "mixed: plain": (PLAIN, None), "mixed: red (trained on)": (JUDGE, None),
    }  # fmt: skip
    assert rewards["mixed: red"]["kwargs"] == {"weight": 2.0}
    assert list(agreement_rewards(found, leave_out=["mixed"])) == ["satisfied", "steady", "satisfied (trained on)",
                                                                   "mixed: red"]  # fmt: skip


def test_the_last_words_of_a_log(tmp_path):
    (tmp_path / "log.txt").write_text("loading\nerror: it is broken; mend it\n\n")
    assert last_words(tmp_path / "log.txt", 2) == "it is broken; mend it (exit status 2)"
    (tmp_path / "log.txt").write_text("")
    assert last_words(tmp_path / "log.txt", -9) == "it said nothing (exit status -9)"
