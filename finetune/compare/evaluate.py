"""One policy of a comparison, before training or at every look at it, as all evaluators see it.

    python -m finetune.compare.evaluate JOB.json

`finetune.compare` starts it, in a process of its own, once for each training and once for what they start from; what it
finds is one file, written when it is whole. Every policy draws from the same noise.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

transformers.logging.set_verbosity_error()  # says on import what does not concern us
transformers.logging.disable_progress_bar()
diffusers.logging.disable_progress_bar()

from finetune.compare.entrants import parse_entrant  # noqa: E402
from finetune.compare.rewards import Spec  # noqa: E402
from finetune.run import load_policy, place_reward  # noqa: E402
from reward.arguments import main_guard  # noqa: E402
from reward.draw import to_image  # noqa: E402
from reward.feedback import Reward  # noqa: E402
from reward.pictures import encode_png  # noqa: E402
from reward.whole_files import write_whole  # noqa: E402
from rl.checkpoints import complete_checkpoints, read_marker  # noqa: E402
from rl.evaluate import TRAINING_REWARD, Evaluation, evaluate  # noqa: E402
from rl.policy_config import PolicyConfig  # noqa: E402
from rl.scoring import left_out, score  # noqa: E402

TABLE = "metadata.jsonl"
_DIGITS = 6


@dataclass(frozen=True)
class Look:
    """A policy at one moment of its training.

    Attributes:
        adapter: folder of what was trained; None: before training.
        updates, images, seconds: what it had cost so far.
    """

    adapter: str | None
    updates: int = 0
    images: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class EvaluationJob:
    """What to look at, and who looks.

    Attributes:
        command, flags: of a training, for how it samples.
        looks: the policies, in order; pictures are kept of the last.
        specs: the rewards that judge, as `Spec.named`.
        out: file for the figures, to which they are added if it has other rewards' of the same looks; beside it, in
            `pictures`, the first picture of each prompt of the last look.
    """

    command: str
    flags: Sequence[str]
    looks: Sequence[Look]
    specs: Sequence[Any]
    prompts: Sequence[str]
    generations: int
    seed: int
    out: str

    def write(self, file: Path) -> None:
        write_whole(file, (json.dumps(asdict(self)) + "\n").encode())

    @classmethod
    def read(cls, file: Path) -> "EvaluationJob":
        content = json.loads(file.read_text(encoding="utf-8"))
        return cls(**content | {"looks": [Look(**look) for look in content["looks"]]})


@dataclass(frozen=True)
class Seen:
    """What was seen at one look, of G pictures for each of P prompts.

    Attributes:
        values: key of a spec -> name of a term, "" for the objective -> P lists of G.
        diversity: P numbers; none where G = 1.
        drawn: P lists of G; how much is drawn, see `rl.monitors.edge_energy`.
    """

    look: Look
    values: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]
    diversity: Sequence[float]
    drawn: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Findings:
    """All looks of a job.

    Attributes:
        failed: key of a spec whose reward failed at some picture, so that `seen` has none of its values -> why.
    """

    prompts: Sequence[str]
    seen: Sequence[Seen] = field(default_factory=list)
    failed: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> "Findings":
        content = json.loads(file.read_text(encoding="utf-8"))
        seen = [Seen(**one | {"look": Look(**one["look"])}) for one in content["seen"]]
        return cls(content["prompts"], seen, content.get("failed", {}))


def main(argv: Sequence[str] | None = None) -> None:
    (file,) = sys.argv[1:] if argv is None else argv
    run_job(EvaluationJob.read(Path(file)))


def run_job(job: EvaluationJob) -> None:
    """Look at all, and write what is seen; a reward that fails is left out, and noted.

    Raises:
        DivergedError: what a policy draws is not finite.
        ValueError: the policy cannot be loaded, or every reward fails.
    """
    run, args = parse_entrant(job.command, job.flags)
    specs = [Spec(tuple(map(tuple, named))) for named in job.specs]
    rewards = {spec.key: _Excused(spec, args) for spec in specs}
    policy = load_policy(run.policy, args).to(args.device)
    _, schedule = args.make_schedule(policy.scheduler)
    # `evaluate` wants a reward of that name; which one it is does not matter here
    named = {TRAINING_REWARD if place == 0 else spec.key: rewards[spec.key] for place, spec in enumerate(specs)}
    pictures = Path(job.out).with_name("pictures")
    seen = []
    for look in job.looks:
        if look.adapter is not None:
            policy.load_adapter(look.adapter)
        keep = _Keeper(pictures, job) if look is job.looks[-1] else None
        with torch.no_grad(), _autocast(args):
            found = evaluate(
                policy, schedule, job.prompts, named, generations=job.generations, seed=job.seed,
                guidance_scale=args.guidance_scale, batch_size=args.per_device_eval_batch_size,
                reward_batch_size=args.reward_batch_size, on_images=keep or (lambda numbers, images: None),
            )  # fmt: skip
        failed = {key: reward.failed for key, reward in rewards.items() if reward.failed}
        if len(failed) == len(rewards):
            raise ValueError(next(iter(failed.values())))
        seen.append(_seen(look, found, specs))
        if keep is not None:
            keep.finish()
    seen = [replace(one, values={key: of for key, of in one.values.items() if key not in failed}) for one in seen]
    findings = Findings(list(job.prompts), _added(seen, Path(job.out)), failed)
    write_whole(Path(job.out), (json.dumps(asdict(findings)) + "\n").encode())


def _seen(look: Look, found: Evaluation, specs: Sequence[Spec]) -> Seen:
    values: dict[str, dict[str, list]] = {}
    for place, spec in enumerate(specs):
        name = TRAINING_REWARD if place == 0 else spec.key
        objective = name if place == 0 else f"{name}.total"
        mine = {"": found.values[objective]}
        mine |= {key[len(name) + 1 :]: value for key, value in found.values.items()
                 if key.startswith(f"{name}.") and key != objective}  # fmt: skip
        values[spec.key] = {term: _rounded(value) for term, value in mine.items()}
    several = found.diversity.isfinite().all()
    diversity = _rounded(found.diversity) if several else []
    return Seen(look, values, diversity, _rounded(found.values["edge_energy"]))


def _added(seen: Sequence[Seen], out: Path) -> list[Seen]:
    known = Findings.read(out).seen if out.is_file() else []
    if [one.look for one in known] != [one.look for one in seen]:
        return list(seen)
    return [replace(one, values={**before.values, **one.values}) for before, one in zip(known, seen, strict=True)]


def _rounded(value: torch.Tensor) -> list:
    return [[round(one, _DIGITS) for one in row] if isinstance(row, list) else round(row, _DIGITS)
            for row in value.double().tolist()]  # fmt: skip


def _autocast(args: PolicyConfig):
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    return nullcontext() if dtype is None else torch.autocast(args.device.type, dtype)


class _Excused:
    """A reward that may fail at any picture; then `failed` says why, and what it says is nothing.

    Others are asked about the same pictures, which cost far more than it does.
    """

    differentiable = False

    def __init__(self, spec: Spec, args: PolicyConfig):
        self.failed, self._terms = "", ()
        self._name = ", ".join(reward for _, reward, _, _ in spec.named)
        self._reward = self._try(lambda: place_reward(spec.make(), args))

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> Reward:
        said = None if self.failed else self._try(lambda: score(self._reward, images, prompts))
        if said is None:
            nothing = torch.zeros(len(prompts))
            return Reward(total=nothing, terms=dict.fromkeys(self._terms, nothing))
        self._terms = tuple(said.terms)
        return said

    def _try(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except Exception as error:  # whatever it raises
            self.failed = left_out(self._name, error)
            return None


class _Keeper:
    """Keeps the first picture of each prompt, as an image folder that other commands read."""

    def __init__(self, folder: Path, job: EvaluationJob):
        self.folder, self.job = folder, job
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, numbers: Sequence[int], images: torch.Tensor) -> None:
        for number, image in zip(numbers, images, strict=True):
            prompt, generation = divmod(number, self.job.generations)
            if generation == 0:
                write_whole(self.folder / f"{prompt:05}.png", encode_png(to_image(image)))

    def finish(self) -> None:
        lines = [json.dumps({"file_name": f"{place:05}.png", "text": prompt}, ensure_ascii=False)
                 for place, prompt in enumerate(self.job.prompts)]  # fmt: skip
        write_whole(self.folder / TABLE, ("\n".join(lines) + "\n").encode())


def looks_of(run_folder: Path, pictures: int, most: int, on_cpu: bool, every: int = 1) -> list[Look]:
    """The checkpoints of a finished training, at most `most`, evenly spread, the end among them.

    Args:
        pictures: of a rollout.
        on_cpu: whether seconds are the processor's.
        every: updates between two checkpoints; others but the last were written because the training was stopped, and
            are passed over, or its curve would lie elsewhere than those of other seeds.
    """
    there = [(checkpoint, read_marker(checkpoint)) for checkpoint in complete_checkpoints(run_folder)]
    checkpoints = [one for one, marker in there if marker["global_step"] % every == 0 or one is there[-1][0]]
    count = min(most, len(checkpoints))
    chosen = [checkpoints[-1 - place * len(checkpoints) // count] for place in range(count)][::-1]
    found = []
    for checkpoint in chosen:
        marker = read_marker(checkpoint)
        seconds = marker["processor_seconds" if on_cpu else "train_seconds"]
        last = checkpoint is checkpoints[-1]
        found.append(
            Look(
                str(run_folder if last else checkpoint),  # at the end, what the run leaves: the average, if it kept one
                marker["global_step"],
                marker["rollouts"] * pictures,
                round(seconds, 2),
            )
        )
    return found


if __name__ == "__main__":
    main_guard(main)
