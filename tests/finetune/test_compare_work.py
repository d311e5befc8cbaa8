"""Processes of a comparison: on their own device, stopped when asked to, and never two of one comparison."""

import io
import json
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from finetune.compare.evaluate import EvaluationJob, Findings, Look, Seen
from finetune.compare.folder import run_folder
from finetune.compare.report import build
from finetune.compare.results import read_results
from finetune.compare.rewards import Spec
from finetune.compare.runs import Failure, Step, Work, read_failures, read_outcome
from finetune.fingerprints import code
from reward.folder_lock import FolderInUseError, check_free
from tests.finetune.compare_case import HELD_OUT, Figures, comparison_of, write_agreement

SAYS = 'import os; print(os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["OMP_NUM_THREADS"])'


@pytest.fixture
def make_work(tmp_path, pipeline_folder):
    files = []

    def make(**changes):
        files.append((tmp_path / "lock").open("a+"))
        return Work(comparison_of(tmp_path, pipeline_folder, **changes), Console(quiet=True), files[-1])

    yield make
    for file in files:
        file.close()


def snippet(tmp_path, statement):
    """A step that runs it once."""
    return Step("snippet", ["timeit", "-n", "1", "-r", "1", statement], tmp_path / "log.txt")


def test_a_step_has_its_own_device_and_threads(make_work, tmp_path):
    work = make_work(gpus=["0", "3"], threads=2)
    assert work.at_once == 2
    assert work._run(snippet(tmp_path, SAYS), gpu="3") is None
    assert (tmp_path / "log.txt").read_text().startswith("3 2\n")
    assert make_work(jobs=5).at_once == 5


def test_trainings_that_run_at_once_never_share_a_device(make_work, monkeypatch):
    """Four trainings, two devices: while one has a device, no other one has."""
    work, busy, seen, clashes = make_work(gpus=["0", "1"], seeds=[0, 1, 2, 3], only=["red"]), set(), [], []

    def run(step, gpu=None):
        clashes.extend([gpu] * (gpu in busy))
        busy.add(gpu)
        seen.append(gpu)
        time.sleep(0.05)
        busy.remove(gpu)
        return Failure(step.name, "broken", "log")

    monkeypatch.setattr(work, "_run", run)
    outcome = work.train_all()
    assert set(seen) == {"0", "1"}
    assert len(seen) == 4
    assert not clashes
    assert sorted(outcome.failures) == [("red", seed) for seed in range(4)]
    assert read_failures(work.comparison) == outcome.failures  # for a report without another try
    monkeypatch.setattr(work, "_run", lambda step, gpu=None: work.stop(terminate=False))
    with pytest.raises(KeyboardInterrupt):
        work.train_all()
    assert len(read_failures(work.comparison)) < 4  # what is tried again has not failed


def test_entrants_that_are_added_have_base_and_agreement_asked_anew(make_work, monkeypatch):
    """A quick try of one entrant leaves a base that another one's reward has never seen."""
    work = make_work(agreement_prompts=2, only=["red"])
    Figures(work.comparison, {}).write()
    write_agreement(work.comparison)

    def asked(work):
        steps = []
        monkeypatch.setattr(work, "_run", lambda step, gpu=None: steps.append(step.name))
        work.judge_bases()
        work.ask_for_agreement()
        return steps

    assert asked(work) == []
    whole = make_work(agreement_prompts=2)
    with pytest.raises(ValueError, match="does not know all rewards"):
        read_results(whole.comparison, {})
    assert asked(whole) == ["judging the policy before training", "agreement"]
    assert asked(make_work(agreement_prompts=2, only=["red"], seeds=[0, 1, 2, 3])) == []


def test_an_entrant_whose_reward_cannot_judge_the_base_fails_alone(make_work, monkeypatch):
    """Its trainings are failures, the others are trained."""
    work, asked = make_work(seeds=[0, 1], overlay={}), []
    specs = {one.name: one.spec for one in work.comparison.entrants}
    names = {spec.key: name for name, spec in specs.items()}

    def run(step, gpu=None):
        if not step.name.startswith("judging"):
            return Failure(step.name, "not now", "log")
        job = EvaluationJob.read(Path(step.command[1]))
        keys = [Spec(tuple(map(tuple, named))).key for named in job.specs]
        asked.append([names[key] for key in keys])
        failed = {specs["plain"].key: "no such model"}
        if set(keys) == set(failed):
            return Failure(step.name, "no such model", str(step.log))
        values = {key: {"": [[0.5, 0.5]] * 6, "satisfied": [[1.0, 0.0]] * 6} for key in keys if key not in failed}
        known = Findings.read(Path(job.out)).seen[0].values if Path(job.out).is_file() else {}
        seen = Seen(Look(None), {**known, **values}, [0.1] * 6, [[0.1, 0.1]] * 6)
        Path(job.out).write_text(json.dumps(asdict(Findings(list(job.prompts), [seen], failed))))
        return None

    monkeypatch.setattr(work, "_run", run)
    outcome = work.do()
    assert asked == [["the judge", "red", "plain"]]
    said = {key: failure.said for key, failure in outcome.failures.items()}
    assert said == {(name, seed): "no such model" if name == "plain" else "not now"
                    for name in specs for seed in (0, 1)}  # fmt: skip
    assert read_failures(work.comparison) == outcome.failures
    results = {one.entrant.name: one for one in read_results(work.comparison, outcome.failures)}
    assert sorted(results["plain"].failures) == [0, 1]
    assert not np.isfinite(results["plain"].base.own).any()
    assert np.isfinite(results["red"].base.own).all()
    with pytest.raises(ValueError, match="does not know all rewards"):
        read_results(work.comparison, {})

    asked.clear()
    work.do()  # again, and only what is missing
    assert asked == [["plain"]]


@pytest.mark.parametrize("asked_of", [HELD_OUT[0], None], ids=["fails", "sound"])
def test_an_overlay_that_fails_is_found_out_before_a_training(make_work, monkeypatch, asked_of):
    fails = {"reward": "tests.finetune.compare_case:FailsAt", "kwargs": {"prompt": asked_of}}
    work, ran = make_work(overlay=fails), []
    Figures(work.comparison, {}).write(leave_out={("red", 0)})
    monkeypatch.setattr(work, "_run", lambda step, gpu=None: ran.append(step.name))
    with (
        nullcontext()
        if asked_of is None
        else pytest.raises(ValueError, match="overlay: RuntimeError: the scorer's licence")
    ):
        work.do()
    assert ran == (["training"] if asked_of is None else [])


def test_agreement_that_fails_is_no_end_and_not_forgotten(make_work, monkeypatch):
    work = make_work(agreement_prompts=2)
    Figures(work.comparison, {}).write()
    failed = Failure("agreement", "no such picture", "log")
    monkeypatch.setattr(work, "_run", lambda step, gpu=None: failed)
    outcome = work.do()
    assert outcome.agreement == failed
    assert not outcome.failures
    assert read_outcome(work.comparison) == outcome
    monkeypatch.setattr(work, "_run", lambda step, gpu=None: None)
    assert work.do().agreement is None
    assert read_outcome(work.comparison).agreement is None


def test_an_evaluator_that_cannot_judge_the_base_ends_it(make_work, monkeypatch):
    work = make_work()
    monkeypatch.setattr(work, "_run", lambda step, gpu=None: Failure(step.name, "no such model", str(step.log)))
    with pytest.raises(ValueError, match="the policy before training cannot be judged: no such model"):
        work.do()


def test_a_training_whose_checkpoints_are_gone_before_it_is_judged_fails_alone(make_work):
    work = make_work()
    red = work.comparison.entrants[0]
    folder = run_folder(work.comparison, red, 0)
    folder.mkdir(parents=True)
    (folder / "finished.json").write_text("{}")
    failure, _ = work.train_and_judge(red, 0)
    assert failure.said == f"there is no checkpoint in {folder} to look at; delete the folder and train again"


def test_what_a_training_says_of_itself_is_kept_when_it_is_judged(make_work, monkeypatch):
    work = make_work()
    Figures(work.comparison, {}).write()
    red = work.comparison.entrants[0]
    folder = run_folder(work.comparison, red, 0)
    (folder / "finished.json").write_text("{}")
    marker = json.loads((folder / "checkpoint-2" / "complete.json").read_text()) | {"processor_seconds": 5.0}
    (folder / "checkpoint-2" / "complete.json").write_text(json.dumps(marker))
    monkeypatch.setattr(work, "_run", lambda step, gpu=None: None)
    (folder / "code.txt").write_text("abc")  # as it was when the training began
    assert work.train_and_judge(red, 0)[0] is None
    facts = {"kl": 2e-4, "monitors": [], "wall_seconds": 6.0, "code": "abc"}
    assert json.loads((folder / "facts.json").read_text()) == facts


def test_a_reward_that_fails_on_a_tuned_policy_is_named_and_asked_again(make_work, monkeypatch, tmp_path):
    """Others keep their columns; the entrant cannot win, and the next start judges it again."""
    work = make_work(seeds=[0, 1, 2])
    comparison = work.comparison
    Figures(comparison, {"red": {"satisfied": 0.1, "blue": 0.1, "redness": 0.2}}, noise=0.01).write()
    red = comparison.entrants[0]
    folder, marker = run_folder(comparison, red, 1), {"processor_seconds": 5.0}
    for checkpoint in run_folder(comparison, red, 0).parent.glob("*/checkpoint-2/complete.json"):
        checkpoint.write_text(json.dumps(json.loads(checkpoint.read_text()) | marker))
    whole = (folder / "findings.json").read_text()
    (folder / "findings.json").unlink()
    (folder / "finished.json").write_text("{}")

    def run(step, gpu=None):
        job = EvaluationJob.read(Path(step.command[1]))
        found = json.loads(whole)
        for seen in found["seen"]:
            del seen["values"][red.spec.key]
        Path(job.out).write_text(json.dumps(found | {"failed": {red.spec.key: "no licence"}}))

    monkeypatch.setattr(work, "_run", run)
    outcome = work.train_all()
    (failure,) = outcome.failures.values()
    assert (failure.step, failure.said) == ("evaluation by redness", "no licence")
    assert read_failures(comparison) == outcome.failures
    results = read_results(comparison, outcome.failures)
    assert list(results[0].gains("satisfied")) == [0, 1, 2]
    assert list(results[0].gains("redness")) == [0, 2]
    content, verdict = build(comparison, results, None, None, ["python"])
    row = next(row for row in content["entrants"] if row["name"] == "red")
    assert row["gains"]["satisfied"]["seeds"] == 3
    assert row["gains"]["redness"]["seeds"] == row["own"]["seeds"] == 2
    assert row["unfinished"] == "seed 1: evaluation by redness failed, no licence"
    assert verdict.winners == []
    assert "NaN" not in json.dumps({name: content[name] for name in ("entrants", "pairs", "verdict")})

    monkeypatch.setattr(work, "_run", lambda step, gpu=None: (folder / "findings.json").write_text(whole) and None)
    assert not work.train_all().failures
    assert read_failures(comparison) == {}


def test_which_code_trains_is_noted(make_work, monkeypatch):
    work = make_work(seeds=[0], only=["red"])
    monkeypatch.setattr(work, "_run", lambda step, gpu=None: Failure(step.name, "no", str(step.log)))
    work.train_and_judge(work.comparison.entrants[0], 0)
    assert (run_folder(work.comparison, work.comparison.entrants[0], 0) / "code.txt").read_text() == code()


def test_a_disk_that_is_full_costs_no_other_training(make_work, monkeypatch):
    """Where not even the reason can be kept, it is said."""
    said = io.StringIO()
    work = make_work(seeds=[0], only=["red", "plain"])
    work.console = Console(file=said, width=200)

    def run(step, gpu=None):
        if "red" in str(step.log):
            raise OSError(28, "No space left on device", str(step.log))
        return Failure(step.name, "something else", str(step.log))

    monkeypatch.setattr(work, "_run", run)
    monkeypatch.setattr(Failure, "write", lambda failure, file: (_ for _ in ()).throw(OSError("no space for it")))
    failures = work.train_all().failures
    assert {name for name, _ in failures} == {"red", "plain"}
    assert "No space left on device" in failures["red", 0].said
    assert said.getvalue().count("why it failed cannot be kept: no space for it") == 2


def test_what_a_step_said_last_is_why_it_failed(make_work, tmp_path):
    failure = make_work()._run(snippet(tmp_path, 'raise SystemExit("error: no such picture")'))
    assert failure.said.endswith("no such picture (exit status 1)")
    assert failure.log == str(tmp_path / "log.txt")


def test_a_stop_ends_what_runs_and_starts_nothing_more(make_work, tmp_path):
    work, found = make_work(), []
    step = snippet(tmp_path, "import time; time.sleep(60)")
    thread = threading.Thread(target=lambda: found.append(work._run(step)))
    thread.start()
    while not work._running:
        time.sleep(0.01)
    assert str(next(iter(work._running))) in (tmp_path / "lock").read_text()
    work.stop(terminate=True)
    thread.join(timeout=20)
    assert found[0].said.endswith("(exit status -15)")
    began = time.monotonic()
    assert work._run(step) is None
    assert time.monotonic() - began < 5
    with pytest.raises(KeyboardInterrupt):
        work.train_all()


def test_processes_that_outlive_their_comparison_keep_its_folder(tmp_path):
    """The lock is theirs too, so a second start is refused as long as one of them lives."""
    code = (
        "import subprocess, sys\n"
        "from reward.folder_lock import taken\n"
        "with taken(sys.argv[1]) as lock:\n"
        "    code = 'import time; time.sleep(60)'\n"
        "    child = subprocess.Popen([sys.executable, '-c', code], pass_fds=(lock.fileno(),), stdout=-3)\n"
        "    print(child.pid, flush=True)\n"
        "    import os; os._exit(1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, timeout=120)
    child = int(done.stdout)
    with pytest.raises(FolderInUseError, match="in use by another run"):
        check_free(tmp_path)
    subprocess.run(["kill", str(child)], check=True)
    end = time.monotonic() + 20
    while True:
        try:
            check_free(tmp_path)
            break
        except FolderInUseError:
            assert time.monotonic() < end
            time.sleep(0.05)
