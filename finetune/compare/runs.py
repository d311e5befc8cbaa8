"""The work of a comparison: the policy before training is judged, all rewards are asked to agree, all are trained on.

Every step is a process of its own, with a log beside what it makes. A file that is there is not made again, unless
rewards were added that base or agreement do not know yet; a training that was stopped goes on from its last checkpoint.
So a comparison may be killed at any moment. An entrant that fails, before its training or in it, ends alone, and why is
kept where its findings would be.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape

from finetune.compare.agreement import agreement_command, agreement_rewards, is_agreed
from finetune.compare.config import Comparison
from finetune.compare.entrants import Entrant, parse_entrant, run_flags
from finetune.compare.evaluate import EvaluationJob, Findings, Look, looks_of
from finetune.compare.facts import CODE, TrainingFacts
from finetune.compare.folder import (
    FINDINGS,
    agreement_failure,
    base_findings,
    is_judged,
    run_failure,
    run_folder,
    training_command,
    unasked,
)
from finetune.compare.pictures import check_overlay
from finetune.compare.rewards import Spec
from finetune.fingerprints import code
from reward.whole_files import write_whole
from rl.checkpoints import FINISHED

ROOT = Path(__file__).resolve().parents[2]
_POLL = 0.5  # seconds


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: for the console.
        command: behind `python -m`.
        log: file of all that it says.
    """

    name: str
    command: Sequence[str]
    log: Path


@dataclass(frozen=True)
class Failure:
    """A step that ended with an error.

    Attributes:
        said: the last line of its log.
    """

    step: str
    said: str
    log: str

    def write(self, file: Path) -> None:
        write_whole(file, (json.dumps(asdict(self)) + "\n").encode())


@dataclass
class Outcome:
    """What became of the work.

    Attributes:
        failures: (entrant, seed) -> why there are no findings.
        agreement: why agreement before training could not be measured, if it could not.
    """

    failures: dict[tuple[str, int], Failure] = field(default_factory=dict)
    agreement: Failure | None = None


class Work:
    """Runs what is missing.

    Args:
        lock: the open lock file of the folder; processes hold it with this one, so that none of a comparison that was
            killed can be forgotten.
    """

    def __init__(self, comparison: Comparison, console: Console, lock: TextIO):
        self.comparison, self.console = comparison, console
        self._lock_file, self._lock = lock, threading.Lock()
        self._environment = dict(os.environ)  # now: settings are read in threads, and set some of it for a moment
        self._running: dict[int, subprocess.Popen] = {}
        self._stopping = False
        self._gpus: queue.Queue[str] = queue.Queue()
        for gpu in comparison.arguments.gpus:
            self._gpus.put(gpu)

    @property
    def at_once(self) -> int:
        return len(self.comparison.arguments.gpus) or self.comparison.arguments.jobs

    def do(self) -> Outcome:
        """All of it, in the order base, agreement, then seed by seed all entrants.

        Raises:
            ValueError: the evaluators cannot judge what everyone starts from, so that nothing could be compared; or the
                overlay's reward cannot be asked, which is found out before a training rather than after the last.
            KeyboardInterrupt: a signal; trainings have written checkpoints first.
        """
        with _Signals(self.stop):
            broken = self.judge_bases()
            check_overlay(self.comparison)
            disagreement = self.ask_for_agreement(broken)
            return replace(self.train_all(broken), agreement=disagreement)

    def train_all(self, broken: Mapping[str, Failure] | None = None) -> Outcome:
        """Seed by seed all entrants, so that whenever it is stopped, they can be compared.

        Args:
            broken: entrants that are not trained -> why.
        """
        broken, outcome, asked = broken or {}, Outcome(), []
        for seed in self.comparison.arguments.seeds:
            for entrant in self.comparison.entrants:
                if entrant.name in broken:
                    outcome.failures[entrant.name, seed] = broken[entrant.name]
                    self._keep(broken[entrant.name], run_failure(self.comparison, entrant, seed))
                else:
                    asked.append((entrant, seed))
        missing = [one for one in asked if not is_judged(self.comparison, *one)]
        done = len(asked) - len(missing)
        if done:
            self.console.print(f"{done} of {len(asked)} trainings are there already")
        with ThreadPoolExecutor(self.at_once) as pool:
            futures = {pool.submit(self.train_and_judge, *one): one for one in missing}
            left = set(futures)
            while left:
                ended, left = wait(left, timeout=_POLL, return_when=FIRST_COMPLETED)  # so that signals come through
                if self._stopping:
                    left = {future for future in left if not future.cancel()}
                    continue
                for future in ended:
                    (entrant, seed), (failure, seconds) = futures[future], future.result()
                    done += 1
                    how = "done" if failure is None else f"[red]FAILED[/]: {escape(failure.said)}"
                    what = f"{done} of {len(asked)}: {escape(entrant.name)}, seed {seed}"
                    self.console.print(f"{what}: {how}, {seconds:.0f} s")
                    if failure is not None:
                        outcome.failures[entrant.name, seed] = failure
                        self._keep(failure, run_failure(self.comparison, entrant, seed))
        self._raise_if_stopping()
        return outcome

    def _keep(self, failure: Failure, file: Path) -> None:
        try:
            failure.write(file)
        except OSError as error:  # a full disk may be why it failed
            self.console.print(f"why it failed cannot be kept: {error}", markup=False)

    def stop(self, terminate: bool) -> None:
        """Start nothing more; with `terminate`, ask what runs to end."""
        self._stopping = True
        if terminate:
            with self._lock:
                for process in self._running.values():
                    process.terminate()

    def _raise_if_stopping(self) -> None:
        if self._stopping:
            raise KeyboardInterrupt

    def judge_bases(self) -> dict[str, Failure]:
        """All rewards look at what entrants start from.

        Returns:
            Entrant whose own reward fails -> why.

        Raises:
            ValueError: an evaluator fails, or has not the term that it is asked for.
        """
        broken = {}
        for base in dict.fromkeys(one.base for one in self.comparison.entrants):
            entrants = [one for one in self.comparison.entrants if one.base == base]
            failures = self._judge_base(entrants[0])
            for one in self.comparison.evaluators:
                if one.spec in failures:
                    why = failures[one.spec]
                    raise ValueError(f"the policy before training cannot be judged: {why.said} (its log: {why.log})")
            self._check_terms(Findings.read(base_findings(self.comparison, entrants[0])))
            broken |= {one.name: failures[one.spec] for one in entrants if one.spec in failures}
        for name, failure in broken.items():
            self.console.print(f"{escape(name)}: [red]FAILED[/]: {escape(failure.said)}")
        return broken

    def _judge_base(self, entrant: Entrant) -> dict[Spec, Failure]:
        """Those rewards that have not looked at an entrant's policy before training do; which fail, and why."""
        missing = unasked(self.comparison, entrant)
        if not missing:
            return {}
        name, file = "judging the policy before training", base_findings(self.comparison, entrant)
        self.console.print(name)
        flags = run_flags(self.comparison, entrant, 0, file.parent / "unused")
        failure = self._evaluate(name, self._job(entrant, flags, [Look(None)], missing, file), file)
        self._raise_if_stopping()
        if failure is not None:
            return dict.fromkeys(missing, failure)
        failed = Findings.read(file).failed
        return {spec: Failure(name, failed[spec.key], str(_log_of(file))) for spec in missing if spec.key in failed}

    def _check_terms(self, found: Findings) -> None:
        for one in self.comparison.evaluators:
            terms = found.seen[0].values[one.spec.key]
            if one.term is not None and one.term not in terms:
                names = ", ".join(term for term in terms if term) or "none"
                raise ValueError(f"evaluators: {one.name} has no term {one.term!r}; its reward has {names}")

    def ask_for_agreement(self, leave_out: Collection[str] = ()) -> Failure | None:
        """By `finetune.agreement`, on pictures of the first entrant's policy before training; its failure is no end.

        Args:
            leave_out: names of entrants whose rewards are not asked.
        """
        arguments, folder = self.comparison.arguments, self.comparison.folder / "agreement"
        rewards = agreement_rewards(self.comparison, leave_out)
        if not arguments.agreement_prompts or is_agreed(self.comparison, rewards):
            return None
        self.console.print("asking all rewards about the same pictures")
        command = agreement_command(self.comparison, rewards)
        prompts = self.comparison.train_prompts
        count = min(arguments.agreement_prompts, len(prompts))
        chosen = [prompts[place * len(prompts) // count] for place in range(count)]
        write_whole(folder / "prompts.txt", ("\n".join(chosen) + "\n").encode())
        failure = self._run(Step("agreement", command, folder / "log.txt"))
        self._raise_if_stopping()
        agreement_failure(self.comparison).unlink(missing_ok=True)
        if failure:
            self.console.print(f"agreement before training could not be measured: {failure.said}", markup=False)
            failure.write(agreement_failure(self.comparison))
        return failure

    def train_and_judge(self, entrant: Entrant, seed: int) -> tuple[Failure | None, float]:
        """Train, unless that is done, and judge; why it failed, and the seconds it took."""
        began = time.monotonic()
        if self._stopping:
            return None, 0.0
        folder = run_folder(self.comparison, entrant, seed)
        run_failure(self.comparison, entrant, seed).unlink(missing_ok=True)
        gpu = self._gpus.get() if self.comparison.arguments.gpus else None
        try:
            failure = None
            command = training_command(self.comparison, entrant, seed)
            if not (folder / FINISHED).is_file():
                write_whole(folder / CODE, code().encode())
                failure = self._run(Step("training", command, folder / "log.txt"), gpu)
            if failure is None and not self._stopping:
                failure = self._judge(entrant, command[1:], folder, gpu)
        except (OSError, ValueError, KeyError) as error:  # a full disk, a broken file: the others go on
            failure = Failure("keeping its files", f"{type(error).__name__}: {error}", str(folder))
        finally:
            if gpu is not None:
                self._gpus.put(gpu)
        return failure, time.monotonic() - began

    def _judge(self, entrant: Entrant, flags: Sequence[str], folder: Path, gpu: str | None) -> Failure | None:
        """A finished training, at each of its looks; what it says of itself is kept."""
        arguments, file = self.comparison.arguments, folder / FINDINGS
        _, args = parse_entrant(entrant.command, flags)
        looks = looks_of(folder, entrant.pictures, arguments.looks, args.device.type == "cpu", entrant.save_steps)
        if not looks:
            said = f"there is no checkpoint in {folder} to look at; delete the folder and train again"
            return Failure("evaluation", said, str(folder / "log.txt"))
        TrainingFacts.read(folder).keep(folder)
        specs = list(dict.fromkeys([one.spec for one in self.comparison.evaluators] + [entrant.spec]))
        failure = self._evaluate("evaluation", self._job(entrant, flags, looks, specs, file), file, gpu)
        if failure is not None or not file.is_file():
            return failure
        failed = Findings.read(file).failed
        names = [name for spec in specs if spec.key in failed for name in self._names(spec, entrant)]
        said = "; ".join(dict.fromkeys(failed.values()))
        return Failure(f"evaluation by {', '.join(names)}", said, str(_log_of(file))) if failed else None

    def _names(self, spec: Spec, entrant: Entrant) -> list[str]:
        """Of the evaluators whose reward it is, or that of what is trained on."""
        found = [one.name for one in self.comparison.evaluators if one.spec == spec]
        return found or [f"what {entrant.name} trains on"]

    def _job(
        self, entrant: Entrant, flags: Sequence[str], looks: Sequence[Look], specs: Sequence[Spec], file: Path
    ) -> EvaluationJob:
        arguments = self.comparison.arguments
        return EvaluationJob(
            entrant.command, flags, looks, [spec.named for spec in specs], self.comparison.held_out,
            arguments.generations, arguments.eval_seed, str(file),
        )  # fmt: skip

    def _evaluate(self, name: str, job: EvaluationJob, file: Path, gpu: str | None = None) -> Failure | None:
        description = file.with_name("evaluation_job.json")
        job.write(description)
        return self._run(Step(name, ["finetune.compare.evaluate", str(description)], _log_of(file)), gpu)

    def _run(self, step: Step, gpu: str | None = None) -> Failure | None:
        """One process, on its own threads and device."""
        paths = [str(ROOT), self._environment.get("PYTHONPATH", "")]
        environment = self._environment | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
        environment |= {"OMP_NUM_THREADS": str(self.comparison.arguments.threads)}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        step.log.parent.mkdir(parents=True, exist_ok=True)
        with step.log.open("ab") as log:  # behind what an earlier try said
            began = log.tell()
            with self._lock:
                if self._stopping:
                    return None
                process = subprocess.Popen(
                    [sys.executable, "-m", *step.command], env=environment, stdin=subprocess.DEVNULL, stdout=log,
                    stderr=subprocess.STDOUT, pass_fds=(self._lock_file.fileno(),),
                )  # fmt: skip
                self._running[process.pid] = process
                self._sign()
            try:
                code = process.wait()
            finally:
                with self._lock:
                    del self._running[process.pid]
                    self._sign()
        return None if code == 0 else Failure(step.name, last_words(step.log, code, began), str(step.log))

    def _sign(self) -> None:
        """Who holds the folder, for the message that refuses it to others."""
        self._lock_file.truncate(0)
        for pid in (os.getpid(), *self._running):
            self._lock_file.write(f"{pid} on {os.uname().nodename}\n")
        self._lock_file.flush()


class _Signals:
    """Within it, SIGINT and SIGTERM stop the work. A terminal's Ctrl-C reaches the processes by itself."""

    def __init__(self, stop):
        self._stop = stop
        self._previous: dict[int, Any] = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        print("\nstopping: what runs writes a checkpoint first", flush=True)
        threading.Thread(target=self._stop, args=(number == signal.SIGTERM,)).start()  # the lock may be held here


def read_outcome(comparison: Comparison) -> Outcome:
    """What became of the work, as the last start left it."""
    file = agreement_failure(comparison)
    agreement = Failure(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None
    return Outcome(read_failures(comparison), agreement)


def read_failures(comparison: Comparison) -> dict[tuple[str, int], Failure]:
    """(entrant, seed) -> why there are no findings, as the last start left it."""
    found = {}
    for entrant in comparison.entrants:
        for seed in comparison.arguments.seeds:
            file = run_failure(comparison, entrant, seed)
            if file.is_file() and not is_judged(comparison, entrant, seed):
                found[entrant.name, seed] = Failure(**json.loads(file.read_text(encoding="utf-8")))
    return found


def _log_of(findings: Path) -> Path:
    return findings.with_name("evaluation_log.txt")


def last_words(log: Path, code: int, began: int = 0) -> str:
    """Why a process ended, as the last line of its log says, from its byte `began` on."""
    said = log.read_bytes()[began:].decode(errors="replace")
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    said = lines[-1].removeprefix("error: ") if lines else "it said nothing"
    return f"{said} (exit status {code})"
