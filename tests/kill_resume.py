"""Kill runs with SIGKILL at random moments, start them again with the same command, and look whether anything differs.

    python tests/kill_resume.py --kills 200                             # one rank
    python tests/kill_resume.py --kills 20 --ranks 2 --engine zero2     # two, under torchrun
    python tests/kill_resume.py --kills 20 --auto                       # steps chosen by what was measured before

A tiny pipeline is fine-tuned by a toy reward, once without a disturbance by `run_ddpo.py`, then again and again with
its process group killed and restarted until it ends. The end must be the same bit for bit: the adapter, the newest
checkpoint (optimizer, learning rate schedule, random states, the log's lines), TensorBoard's curves and pictures, the
evaluation. Prints where the kills fell and ends with exit code 1 where anything differs.

With one rank a process is forked from this one, which has imported everything and computed nothing: that saves the
seconds of importing. Most kills wait for a phase, so that short ones are hit as well, and then a little; the others
fall at any time. A run's processes count the phases they enter in a file that is mapped into memory, which
outlives them.
"""

import argparse
import importlib
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: a process with threads must not be forked
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)

import deepspeed  # noqa: E402, F401 - accelerate imports it in the midst of a run
import psutil  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402
from transformers.trainer_pt_utils import safe_globals  # noqa: E402

import finetune.run  # noqa: E402
import rl.ddpo  # noqa: E402
import rl.resumable  # noqa: E402
import run_ddpo  # noqa: E402
from reward.arguments import main_guard  # noqa: E402
from rl.adapter import LORA_WEIGHTS  # noqa: E402
from rl.checkpoints import FINISHED, complete_checkpoints, read_marker  # noqa: E402
from rl.policy import StableDiffusionPolicy  # noqa: E402
from tests.rl.conftest import PROMPTS, make_pipeline  # noqa: E402

PHASES = ("start", "evaluation", "claim", "rollout", "update", "checkpoint", "publish", "finish")
LONGEST = {"start": 0.5, "evaluation": 0.1, "claim": 0.03, "rollout": 0.1, "update": 0.05, "checkpoint": 0.1,
           "publish": 0.1, "finish": 0.2}  # fmt: skip
"""Seconds that a kill waits at most behind the beginning of a phase."""
ONCE = ("start", "evaluation", "claim", "finish")


# ---- The run ----


def arguments(pipeline: str, prompts: Path, output: Path, options: argparse.Namespace) -> list[str]:
    """The command line: `options.rollouts` rollouts of 8 pictures (16 with `auto`) in 2 updates, logged every 3."""
    settings = {
        "policy": pipeline, "reward": "tests.rl.toy_rewards:Redness", "prompts": prompts, "eval_prompts": prompts,
        "eval_generations": 1, "num_before_after": 2, "output_dir": output, "use_cpu": True, "disable_tqdm": True,
        "num_train_epochs": options.rollouts, "num_inference_steps": 3, "train_steps": 1, "generation_batch_size": 8,
        "num_generations": 4, "per_device_train_batch_size": 4 // options.ranks, "gradient_accumulation_steps": 1,
        "logging_steps": 3, "learning_rate": 0.01, "lora_rank": 2, "num_log_images": 2, "seed": 3,
        "resume_from_checkpoint": "auto", "ema_decay": 0.5, "advantage_baseline": "prompt", "prompt_min_count": 4,
        "eval_strategy": "steps", "eval_steps": 4,
    }  # fmt: skip
    if options.auto:
        settings |= {
            "advantage_baseline": "group", "prompt_min_count": 2, "train_steps": "auto:1", "num_inference_steps": 4,
            "generation_batch_size": 16, "gradient_accumulation_steps": 2,
        }  # fmt: skip
    if options.engine == "zero2":
        settings["deepspeed"] = "configs/deepspeed/zero2.json"
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


class PhaseFile:
    """Which phase a run is in, and how often it entered each: bytes in a file that the killed and the killer map."""

    def __init__(self, path: Path):
        self.path = path
        if not path.exists():
            path.write_bytes(bytes(1 + len(PHASES)))
        with path.open("r+b") as file:
            self._bytes = mmap.mmap(file.fileno(), 0)

    def clear(self) -> None:
        self._bytes[:] = bytes(len(self._bytes))

    @property
    def now(self) -> str:
        return PHASES[self._bytes[0]]

    def entered(self, phase: str) -> int:
        return self._bytes[1 + PHASES.index(phase)]

    @contextmanager
    def within(self, phase: str):
        place, before = PHASES.index(phase), self._bytes[0]
        self._bytes[1 + place] = min(255, self._bytes[1 + place] + 1)
        self._bytes[0] = place
        yield
        self._bytes[0] = before

    def watch(self, owner: object, name: str, phase: str) -> None:
        """Make `owner.name` note that it is `phase` while it runs."""
        function = getattr(owner, name)

        def noting(*args, **kwargs):
            with self.within(phase):
                return function(*args, **kwargs)

        setattr(owner, name, noting)


def run(argv: list[str], phases: Path) -> None:
    """What `python run_ddpo.py argv` does, noting its phases; does not return."""
    code = 1
    try:
        if int(os.environ.get("RANK", "0")) == 0:
            file = PhaseFile(phases)
            for owner, name, phase in (
                (rl.ddpo.DDPOTrainer, "judge", "evaluation"),
                (finetune.run, "claim_output_dir", "claim"),
                (rl.ddpo.DDPOTrainer, "collect", "rollout"),
                (rl.ddpo.DDPOTrainer, "training_step", "update"),
                (rl.ddpo.DDPOTrainer, "_save_checkpoint", "checkpoint"),
                (rl.resumable, "publish", "publish"),
                (rl.resumable, "rotate", "publish"),
                (rl.ddpo.DDPOTrainer, "save_model", "finish"),
                (finetune.run, "write_report", "finish"),
                (finetune.run, "mark_finished", "finish"),
            ):
                file.watch(owner, name, phase)
        main_guard(run_ddpo.main, argv)
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # without the teardown of what was inherited, and of gloo, which may abort


class Forked:
    """A run of one rank, forked from this process."""

    def __init__(self, argv: list[str], phases: Path, log: Path):
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            run(argv, phases)

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def kill(self) -> None:
        os.killpg(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        self._code = os.waitstatus_to_exitcode(status)


class Launched:
    """A run of several ranks, started by torchrun."""

    def __init__(self, argv: list[str], phases: Path, log: Path, ranks: int):
        # DeepSpeed compiles a small op on first use, and loads it under a lock: killed runs have their own.
        extensions = phases.parent / "torch_extensions"
        built = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path(sys.prefix) / "torch_extensions"))
        if built.is_dir() and not extensions.exists():
            shutil.copytree(built, extensions)
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
        command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", f"--log_dir={phases.parent / 'logs'}"]
        command += [__file__, "--rank_of", str(phases), *argv]
        with log.open("a") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=output, start_new_session=True, cwd=ROOT,
                env={**os.environ, "TORCH_EXTENSIONS_DIR": str(extensions)},
            )  # fmt: skip

    def poll(self) -> int | None:
        return self._process.poll()

    def kill(self) -> None:
        """All at once: torchrun's workers have sessions of their own, and would go on without it."""
        family = psutil.Process(self._process.pid)
        for process in (family, *family.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()


def in_child(function: Callable, *args):
    """`function(*args)` in a forked process, as this one must not compute: what it returns, by way of JSON."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            with os.fdopen(writer, "w") as pipe:
                json.dump(function(*args), pipe)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    if os.waitpid(pid, 0)[1] != 0:
        raise RuntimeError(f"{function.__name__} failed")
    return json.loads(text)


def make_and_load(folder: Path) -> tuple[str, list[str]]:
    """A tiny pipeline in `folder`, and the modules that are imported only when one is loaded."""
    already = set(sys.modules)
    pipeline = make_pipeline(folder)
    StableDiffusionPolicy.load(pipeline)
    return pipeline, sorted(set(sys.modules) - already)


# ---- What must be the same ----


def traces(folder: Path) -> dict[str, object]:
    """All that a finished run left, name -> value; times are left out."""
    last = complete_checkpoints(folder)[-1]
    state = json.loads((last / "trainer_state.json").read_text())
    state["log_history"] = [without_seconds(entry) for entry in state["log_history"]]
    marker = read_marker(last)
    summary = json.loads((folder / "summary.json").read_text())
    with safe_globals():  # numpy's, in the random states
        states = {
            f"{file.relative_to(folder)}": torch.load(file, map_location="cpu", weights_only=trusted(file))
            for file in sorted(last.rglob("*.pt*"))
        }
    return {
        "adapter": load_file(folder / LORA_WEIGHTS),
        "adapter's bytes": (folder / LORA_WEIGHTS).read_bytes(),
        **states,
        "trainer_state.json": state,
        "complete.json": {name: marker[name] for name in ("global_step", "unlogged")},
        "run_state.json": json.loads((last / "run_state.json").read_text()),
        "run_state.safetensors": load_file(last / "run_state.safetensors"),
        "evaluation.json": json.loads((folder / "evaluation.json").read_text()),
        "before_after.png": (folder / "before_after.png").read_bytes(),
        "samples": {file.name: file.read_bytes() for file in sorted((folder / "samples").iterdir())},
        "summary.json": [summary[name] for name in ("before", "after", "updates", "rollouts")],
        "files": sorted(
            str(path.relative_to(folder))
            for path in folder.rglob("*")
            if path.is_file() and path.parent != folder / "runs"
        ),
        **curves(folder / "runs"),
    }


def trusted(file: Path) -> bool:
    """Whether a file holds tensors and plain values only. DeepSpeed pickles classes of its own."""
    return "global_step" not in str(file.parent.name)


def curves(logs: Path) -> dict[str, object]:
    """TensorBoard's own view of a run: tag -> [(step, value), ...]."""
    events = EventAccumulator(str(logs), size_guidance=dict.fromkeys(("scalars", "images", "tensors"), 0)).Reload()
    tags = events.Tags()
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags["scalars"]}
    found = without_seconds({tag.removeprefix("train/"): events for tag, events in found.items()})
    found |= {tag: [(event.step, event.encoded_image_string) for event in events.Images(tag)] for tag in tags["images"]}
    found |= {tag: [event.step for event in events.Tensors(tag)] for tag in tags["tensors"]}
    return {f"TensorBoard's {tag}": values for tag, values in found.items()}


def without_seconds(entry: dict) -> dict:
    return {name: value for name, value in entry.items() if not name.startswith("seconds/")}


def same(left: object, right: object) -> bool:
    """Whether two values of the same types are equal bit for bit, NaN included."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if hasattr(left, "tobytes"):
        return left.tobytes() == right.tobytes()
    if hasattr(left, "__dict__") and left.__dict__:
        return same(vars(left), vars(right))
    return left == right or (left != left and right != right)


def differences(reference: Path, folder: Path) -> list[str]:
    """What differs between two finished runs, in words."""
    expected, found = traces(reference), traces(folder)
    names = sorted(expected.keys() | found.keys())
    unequal = [name for name in names if not same(expected.get(name), found.get(name))]
    for name in unequal:
        print(f"--- {name}\n{str(expected.get(name))[:600]}\n+++\n{str(found.get(name))[:600]}", flush=True)
    return unequal


# ---- Killing ----


def kill_at_random(
    child: Forked | Launched, phases: PhaseFile, chance: random.Random, importing: float, wanted: str | None = None
) -> str | None:
    """Kill a run at a random moment; returns the phase it was in, None if it ended before.

    Args:
        importing: seconds before `main` begins, in which a kill may fall too.
        wanted: the phase behind whose second beginning it falls, when there is a checkpoint; None: any phase, and some
            kills at any time.
    """
    if wanted or chance.random() < 0.8:
        phase = wanted or chance.choice((*PHASES, "checkpoint", "publish"))
        times = 1 if phase in ONCE else 2 if wanted else chance.randint(1, 4)
        delay = chance.uniform(0, LONGEST[phase] + (importing if phase == "start" else 0))
        reached = lambda: phase == "start" or phases.entered(phase) >= times  # noqa: E731
    else:
        delay, reached = chance.uniform(0, importing + 4), lambda: True
    moment = None
    while child.poll() is None:
        if moment is None and reached():
            moment = time.perf_counter() + delay
        if moment is not None and time.perf_counter() >= moment:
            child.kill()
            return phases.now
        time.sleep(0.0005)
    return None


def fail(what: str, log: Path) -> None:
    print(f"FAILED: {what}\n{log.read_text()[-3000:]}", file=sys.stderr)
    sys.exit(1)


def main(options: argparse.Namespace, folder: Path) -> None:
    chance, start = random.Random(options.seed), time.perf_counter()
    pipeline, modules = in_child(make_and_load, folder)
    for name in modules:
        with suppress(Exception):  # what the libraries try to import and do without
            importlib.import_module(name)
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    phases, log = PhaseFile(folder / "phases"), folder / "log"

    def begin(output: Path) -> Forked | Launched:
        phases.clear()
        log.write_text("")
        argv = arguments(pipeline, prompts, output, options)
        return Forked(argv, phases.path, log) if options.ranks == 1 else Launched(argv, phases.path, log, options.ranks)

    def end(child: Forked | Launched, what: str) -> None:
        while child.poll() is None:
            time.sleep(0.01)
        if child.poll() != 0:
            fail(f"{what} ended with exit code {child.poll()}", log)

    reference = folder / "reference"
    if options.ranks == 1:  # the command itself, in an interpreter of its own
        with log.open("w") as output:
            argv = [sys.executable, "run_ddpo.py", *arguments(pipeline, prompts, reference, options)]
            if subprocess.run(argv, stdout=output, stderr=output, check=False, cwd=ROOT).returncode != 0:
                fail("the run without kills", log)
    else:
        end(begin(reference), "the run without kills")
    print(f"one run without kills: {time.perf_counter() - start:.1f} s", flush=True)

    fell, runs, behind, unequal = Counter(), 0, 0, []
    while sum(fell.values()) < options.kills:
        output = folder / f"run_{runs}"
        while sum(fell.values()) < options.kills:
            child = begin(output)
            importing = 0.0 if options.ranks == 1 else 8.0
            wanted = options.phases[sum(fell.values()) % len(options.phases)] if options.phases else None
            phase = kill_at_random(child, phases, chance, importing, wanted)
            if phase is None:
                break
            fell[phase] += 1
            behind += bool(complete_checkpoints(output))
        else:
            child = begin(output)
        end(child, f"run {runs}, started again after {sum(fell.values())} kills in all,")
        unequal += [f"run {runs}: {name}" for name in in_child(differences, reference, output)]
        if runs == 0 and options.again:
            before = (output / FINISHED).stat().st_mtime_ns
            end(begin(output), "a finished run, started again,")
            unequal += ["a finished run was made again"] * ((output / FINISHED).stat().st_mtime_ns != before)
        shutil.rmtree(output)
        runs += 1
        print(f"{runs} runs, {sum(fell.values())} kills, {time.perf_counter() - start:.0f} s", flush=True)

    print("\n".join(f"{phase:>12}  {fell[phase]:4} kills" for phase in PHASES))
    print(f"{behind} of them when there was a checkpoint")
    print(f"{sum(fell.values())} kills in {runs} runs of {options.rollouts} rollouts, {options.ranks} rank(s), "
          f"engine {options.engine}, seed {options.seed}, {time.perf_counter() - start:.0f} s: "
          f"{'; '.join(unequal) if unequal else 'every run ended as the one without kills'}")  # fmt: skip
    sys.exit(1 if unequal else 0)


def options_of(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="how many in all")
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=1)
    parser.add_argument("--engine", choices=("none", "ddp", "zero2"), help="default: none for one rank, ddp for two")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--rollouts", type=int, default=8, help="of a run")
    parser.add_argument("--auto", action="store_true", help="runs that choose their steps by train_steps auto")
    parser.add_argument(
        "--phases", nargs="+", choices=PHASES, default=(), help="that the kills fall in, in turn (default: any)"
    )
    parser.add_argument(
        "--again", action=argparse.BooleanOptionalAction, default=True, help="start a finished run once"
    )
    options = parser.parse_args(argv)
    options.engine = options.engine or ("none" if options.ranks == 1 else "ddp")
    if (options.engine == "none") != (options.ranks == 1):
        parser.error(f"--engine {options.engine} does not go with --ranks {options.ranks}")
    return options


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank_of"]:
        run(sys.argv[3:], Path(sys.argv[2]))
    with tempfile.TemporaryDirectory(prefix="kill_resume") as temporary:
        main(options_of(sys.argv[1:]), Path(temporary))
