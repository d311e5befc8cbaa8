"""The work of a comparison: the policy before training is judged, all rewards are asked to agree, all are trained on.

The folder of a comparison:

    comparison.json              its settings; another start with others is refused
    base/<key>/findings.json     what the evaluators say of the policy before training; pictures/ beside it
    agreement/agreement.json     what all rewards say of the same pictures, by `finetune.agreement`
    runs/<entrant>/seed<N>/      a training, as its own command leaves it; with findings.json and pictures/ beside that
    report.html, report.md, report.json

Every step is a process of its own, with a log beside what it makes. A file that is there is not made again, unless
rewards were added that base or agreement do not know yet; a training that was stopped goes on from its last checkpoint.
So a comparison may be killed at any moment.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape

from finetune.command_line import as_flags
from finetune.compare_config import Comparison
from finetune.compare_entrants import Entrant, parse_entrant, run_flags
from finetune.compare_evaluate import EvaluationJob, Findings, Look, looks_of
from finetune.compare_rewards import Spec
from finetune.files import write_whole
from rl.checkpoints import FINISHED, complete_checkpoints, differing_keys
from rl.run_state import RunState
from rl.watch import MONITORS

SETTINGS, FINDINGS, AGREEMENT = "comparison.json", "findings.json", "agreement/agreement.json"
ROOT = Path(__file__).resolve().parents[1]
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


@dataclass
class Outcome:
    """What became of the work.

    Attributes:
        failures: (entrant, seed) -> why there are no findings.
    """

    failures: dict[tuple[str, int], Failure] = field(default_factory=dict)


def claim(comparison: Comparison) -> None:
    """Note the settings in the folder; for when the folder is this process's alone.

    Raises:
        ValueError: see `check_folder`.
    """
    check_folder(comparison)
    file, settings = comparison.folder / SETTINGS, comparison.settings()
    if file.is_file():
        settings = json.loads(file.read_text(encoding="utf-8")) | settings  # entrants that are left out now are kept
    write_whole(file, (json.dumps(settings, indent=1, sort_keys=True) + "\n").encode())


def check_folder(comparison: Comparison) -> None:
    """Look whether the folder is free, or holds this comparison; entrants and seeds may be added to it, or left out.

    Raises:
        ValueError: it holds results of other settings, which are listed, or other files.
    """
    folder = comparison.folder
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file; name a folder")
    if not (folder / SETTINGS).is_file():
        if folder.is_dir() and any(path.name != ".lock" for path in folder.iterdir()):
            raise ValueError(f"output_dir {folder} holds other files; give another --output_dir")
        return
    before, now = json.loads((folder / SETTINGS).read_text(encoding="utf-8")), comparison.settings()
    both = _entrants(before) & _entrants(now)
    before, now = (
        {key: value for key, value in settings.items() if _entrant(key) is None or _entrant(key) in both}
        for settings in (before, now)
    )
    if changed := differing_keys(before, now):
        raise ValueError(
            f"output_dir {folder} holds results of other settings ({'; '.join(changed)}); give another --output_dir"
        )


def _entrants(settings: Mapping[str, Any]) -> set[str]:
    return {_entrant(key) for key in settings} - {None}


def _entrant(key: str) -> str | None:
    """`a` of `entrants.a.learning_rate`; names may have dots, settings have none."""
    return key.removeprefix("entrants.").rpartition(".")[0] if key.startswith("entrants.") else None


# ---- Where things are ----


def base_findings(comparison: Comparison, entrant: Entrant) -> Path:
    return comparison.folder / "base" / entrant.base / FINDINGS


def is_judged(comparison: Comparison, entrant: Entrant) -> bool:
    """Whether an entrant's policy before training was judged by all rewards, those that were added later included."""
    file = base_findings(comparison, entrant)
    return file.is_file() and {spec.key for spec in comparison.specs()} <= set(Findings.read(file).seen[0].values)


def is_agreed(comparison: Comparison) -> bool:
    """Whether all rewards were asked to agree, those that were added later included."""
    file = comparison.folder / AGREEMENT
    if not file.is_file():
        return False
    return set(agreement_names(comparison).values()) <= set(json.loads(file.read_text(encoding="utf-8"))["raters"])


def run_folder(comparison: Comparison, entrant: Entrant, seed: int) -> Path:
    return comparison.folder / "runs" / entrant.folder / f"seed{seed}"


def run_findings(comparison: Comparison, entrant: Entrant, seed: int) -> Path:
    return run_folder(comparison, entrant, seed) / FINDINGS


def training_command(comparison: Comparison, entrant: Entrant, seed: int) -> list[str]:
    """What trains an entrant, behind `python -m`; anyone may run it by hand."""
    return [entrant.command, *run_flags(comparison, entrant, seed, run_folder(comparison, entrant, seed))]


# ---- The steps ----


class Work:
    """Runs what is missing.

    Args:
        lock: the open lock file of the folder; processes hold it with this one, so that none of a comparison that was
            killed can be forgotten.
    """

    def __init__(self, comparison: Comparison, console: Console, lock: TextIO):
        self.comparison, self.console = comparison, console
        self._lock_file, self._lock = lock, threading.Lock()
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
            ValueError: what everyone starts from cannot be judged, so that nothing could be compared.
            KeyboardInterrupt: a signal; trainings have written checkpoints first.
        """
        with _Signals(self.stop):
            self.judge_bases()
            self.ask_for_agreement()
            return self.train_all()

    def train_all(self) -> Outcome:
        """Seed by seed all entrants, so that whenever it is stopped, they can be compared."""
        outcome = Outcome()
        asked = [(entrant, seed) for seed in self.comparison.arguments.seeds for entrant in self.comparison.entrants]
        missing = [one for one in asked if not run_findings(self.comparison, *one).is_file()]
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
        self._raise_if_stopping()
        return outcome

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

    def judge_bases(self) -> None:
        seen = set()
        for entrant in self.comparison.entrants:
            file = base_findings(self.comparison, entrant)
            if entrant.base in seen:
                continue
            seen.add(entrant.base)
            if not is_judged(self.comparison, entrant):
                self.console.print("judging the policy before training")
                flags = run_flags(self.comparison, entrant, 0, file.parent / "unused")
                job = self._job(entrant, flags, [Look(None)], self.comparison.specs(), file)
                failure = self._evaluate("the policy before training", job, file)
                self._raise_if_stopping()
                if failure:
                    raise ValueError(
                        f"the policy before training cannot be judged: {failure.said} (its log: {failure.log})"
                    )
            self._check_terms(Findings.read(file))

    def _check_terms(self, found: Findings) -> None:
        for one in self.comparison.evaluators:
            terms = found.seen[0].values[one.spec.key]
            if one.term is not None and one.term not in terms:
                names = ", ".join(term for term in terms if term) or "none"
                raise ValueError(f"evaluators: {one.name} has no term {one.term!r}; its reward has {names}")

    def ask_for_agreement(self) -> None:
        """By `finetune.agreement`, on pictures of the first entrant's policy before training; its failure is no end."""
        arguments, folder = self.comparison.arguments, self.comparison.folder / "agreement"
        if not arguments.agreement_prompts or is_agreed(self.comparison):
            return
        self.console.print("asking all rewards about the same pictures")
        command = agreement_command(self.comparison)
        prompts = self.comparison.train_prompts
        count = min(arguments.agreement_prompts, len(prompts))
        chosen = [prompts[place * len(prompts) // count] for place in range(count)]
        write_whole(folder / "prompts.txt", ("\n".join(chosen) + "\n").encode())
        failure = self._run(Step("agreement", command, folder / "log.txt"))
        self._raise_if_stopping()
        if failure:
            self.console.print(f"agreement before training could not be measured: {failure.said}", markup=False)

    def train_and_judge(self, entrant: Entrant, seed: int) -> tuple[Failure | None, float]:
        """Train, unless that is done, and judge; why it failed, and the seconds it took."""
        began = time.monotonic()
        if self._stopping:
            return None, 0.0
        folder = run_folder(self.comparison, entrant, seed)
        gpu = self._gpus.get() if self.comparison.arguments.gpus else None
        try:
            failure = None
            command = training_command(self.comparison, entrant, seed)
            if not (folder / FINISHED).is_file():
                failure = self._run(Step("training", command, folder / "log.txt"), gpu)
            if failure is None and not self._stopping:
                file = folder / FINDINGS
                arguments = self.comparison.arguments
                _, args = parse_entrant(entrant.command, command[1:])
                looks = looks_of(folder, entrant.pictures, arguments.looks, args.device.type == "cpu")
                specs = list(dict.fromkeys([one.spec for one in self.comparison.evaluators] + [entrant.spec]))
                failure = self._evaluate("evaluation", self._job(entrant, command[1:], looks, specs, file), file, gpu)
        finally:
            if gpu is not None:
                self._gpus.put(gpu)
        return failure, time.monotonic() - began

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
        step = Step(name, ["finetune.compare_evaluate", str(description)], file.with_name("evaluation_log.txt"))
        return self._run(step, gpu)

    def _run(self, step: Step, gpu: str | None = None) -> Failure | None:
        """One process, on its own threads and device."""
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
        environment |= {"OMP_NUM_THREADS": str(self.comparison.arguments.threads)}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        step.log.parent.mkdir(parents=True, exist_ok=True)
        with step.log.open("w", encoding="utf-8") as log:
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
        return None if code == 0 else Failure(step.name, last_words(step.log, code), str(step.log))

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


def last_words(log: Path, code: int) -> str:
    """Why a process ended, as the last line of its log says."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = lines[-1].removeprefix("error: ") if lines else "it said nothing"
    return f"{said} (exit status {code})"


# ---- What else a training tells ----


@dataclass(frozen=True)
class TrainingFacts:
    """What a finished training says of itself.

    Attributes:
        kl: to the base at its last rollout, nats a latent value; None where it was not measured.
        monitors: those of `rl.watch` that were ever across their limits.
        wall_seconds: of training, whatever ran beside it.
    """

    kl: float | None
    monitors: Sequence[str]
    wall_seconds: float

    @classmethod
    def read(cls, folder: Path, limits: Mapping[str, float | None]) -> "TrainingFacts":
        checkpoint = complete_checkpoints(folder)[-1]
        log = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        kls = [line["kl"] for line in log if "kl" in line]
        crossed = set(RunState.read(checkpoint).facts["watch"].get("over", []))
        for line in log:
            for name, monitor in MONITORS.items():
                limit = limits.get(name, monitor.limit)
                value = line.get(f"watch/{name}")
                # what is judged of the held-out reward is less than its curve, see `rl.watch.Watch`
                if value is not None and limit is not None and name != "held_out" and monitor.crossed(value, limit):
                    crossed.add(name)
        seconds = json.loads((checkpoint / "complete.json").read_text(encoding="utf-8"))["train_seconds"]
        return cls(kls[-1] if kls else None, [name for name in MONITORS if name in crossed], seconds)


# ---- Agreement ----


def agreement_names(comparison: Comparison) -> dict[Spec, str]:
    """The rewards that are asked to agree, each once and by a name; of weighted sums, the members."""
    found: dict[Spec, list[str]] = {}
    for one in comparison.evaluators:
        found.setdefault(one.spec, []).append(one.name)
    for entrant in comparison.entrants:
        if len(entrant.spec.named) == 1 and not entrant.spec.named[0][0]:
            found.setdefault(entrant.spec, []).append(entrant.name)
            continue
        for name, reward, kwargs, _ in entrant.spec.named:
            found.setdefault(Spec.of(reward, json.loads(kwargs)), []).append(f"{entrant.name}: {name}")
    evaluators = {one.name for one in comparison.evaluators}
    return {
        spec: next((name for name in names if name in evaluators), ", ".join(names)) for spec, names in found.items()
    }


def agreement_command(comparison: Comparison) -> list[str]:
    """What measures it, behind `python -m`."""
    arguments, folder, start = comparison.arguments, comparison.folder / "agreement", comparison.entrants[0].start
    rewards = {}
    for spec, name in agreement_names(comparison).items():
        ((_, reward, kwargs, _),) = spec.named
        rewards[name] = {"reward": reward, "kwargs": json.loads(kwargs)}
    settings: dict[str, Any] = {"report": str(comparison.folder / AGREEMENT), "rewards": rewards}
    if "pictures" not in arguments.agreement:
        names = ("policy", "num_inference_steps", "eta", "guidance_scale", "model_dtype", "start_timestep",
                 "resolution", "base_adapters")  # fmt: skip
        settings |= {name: start[name] for name in names if start[name] not in (None, [])}
        settings |= {"pictures": str(folder / "pictures"), "prompts": str(folder / "prompts.txt")}
        settings["num_generations"] = arguments.agreement_generations
    if comparison.decide_by is not None:
        spec = next(one.spec for one in comparison.evaluators if one.name == comparison.decide_by)
        settings["against"] = [agreement_names(comparison)[spec], *arguments.agreement.get("labels", [])]
    _, args = parse_entrant(comparison.entrants[0].command, training_command(comparison, comparison.entrants[0], 0)[1:])
    settings |= {"use_cpu": args.use_cpu, **arguments.agreement}
    return ["finetune.agreement", *as_flags(settings)]
