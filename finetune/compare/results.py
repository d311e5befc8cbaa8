"""What a comparison has found so far, read from its folder into tables.

Shapes: S seeds, L looks at a training, P held-out prompts. A prompt's figure is the mean over its pictures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from finetune.compare.config import Comparison
from finetune.compare.entrants import Entrant
from finetune.compare.evaluate import Findings, Seen
from finetune.compare.facts import TrainingFacts
from finetune.compare.folder import base_findings, run_findings, run_folder, unasked
from finetune.compare.rewards import Evaluator, Spec
from finetune.compare.runs import Failure


@dataclass(frozen=True)
class Base:
    """An entrant's policy before training.

    Attributes:
        columns: evaluator -> (P,).
        spread: evaluator -> standard deviation over all pictures.
        own: (P,), the entrant's own reward, NaN where it failed; `own_spread` its standard deviation.
        drawn: (P,); how much is drawn.
        diversity: (P,), None with one picture a prompt.
    """

    columns: Mapping[str, np.ndarray]
    spread: Mapping[str, float]
    own: np.ndarray
    own_spread: float
    drawn: np.ndarray
    diversity: np.ndarray | None


@dataclass(frozen=True)
class Trained:
    """An entrant's trainings that are done.

    Attributes:
        seeds: S of them, in the order asked for.
        images, seconds: (S, L), what each look had cost.
        columns: evaluator -> (S, L, P), NaN where it failed.
        own: (S, L, P), likewise.
        drawn: (S, L, P).
        diversity: (S, L, P), None with one picture a prompt.
        facts: of each training.
        failures: seed -> why it is not there; `missing`: seeds that nobody has tried yet.
    """

    entrant: Entrant
    base: Base
    seeds: Sequence[int]
    images: np.ndarray
    seconds: np.ndarray
    columns: Mapping[str, np.ndarray]
    own: np.ndarray
    drawn: np.ndarray
    diversity: np.ndarray | None
    facts: Sequence[TrainingFacts]
    failures: Mapping[int, Failure]
    missing: Sequence[int]

    def gains(self, evaluator: str) -> dict[int, np.ndarray]:
        """Seed -> (P,), at the end, against the base; of those trainings that the evaluator judged."""
        table = self.columns[evaluator][:, -1] - self.base.columns[evaluator]
        return {seed: row for seed, row in zip(self.seeds, table, strict=True) if np.isfinite(row).all()}


def read_results(comparison: Comparison, failures: Mapping[tuple[str, int], Failure]) -> list[Trained]:
    """Everything that is there, in the order of the entrants; those without a finished training have S = 0.

    Raises:
        ValueError: the policy before training has not been judged yet, or not by all rewards, so that there is nothing
            to compare with.
    """
    failed = {one.spec for one in comparison.entrants if any(name == one.name for name, _ in failures)}
    excused = failed - {one.spec for one in comparison.evaluators}
    for entrant in comparison.entrants:
        if set(unasked(comparison, entrant)) - excused:
            raise ValueError(
                f"there is nothing to report yet: {base_findings(comparison, entrant)} is missing, or does not know "
                "all rewards; start again without --report_only"
            )
    return [_read_entrant(comparison, entrant, failures) for entrant in comparison.entrants]


def _read_entrant(comparison: Comparison, entrant: Entrant, failures: Mapping[tuple[str, int], Failure]) -> Trained:
    seeds = [seed for seed in comparison.arguments.seeds if run_findings(comparison, entrant, seed).is_file()]
    if entrant.spec in unasked(comparison, entrant):
        seeds = []  # there is nothing to compare its own reward with
    failed = {seed: why for (name, seed), why in failures.items() if name == entrant.name}
    found = [_evenly(Findings.read(run_findings(comparison, entrant, seed)).seen) for seed in seeds]
    looks = min(map(len, found), default=0)
    found = [one[-looks:] for one in found]  # where time decides, a seed may have one less
    base = _read_base(comparison, entrant)
    shape = (len(seeds), looks, len(comparison.held_out))

    def stacked(of) -> np.ndarray:
        return np.array([[of(seen) for seen in one] for one in found], dtype=float).reshape(shape)

    return Trained(
        entrant,
        base,
        seeds,
        np.array([[seen.look.images for seen in one] for one in found], dtype=float).reshape(shape[:2]),
        np.array([[seen.look.seconds for seen in one] for one in found], dtype=float).reshape(shape[:2]),
        {one.name: stacked(lambda seen, one=one: _column(seen, one)) for one in comparison.evaluators},
        stacked(lambda seen: _pictures(seen, entrant.spec).mean(axis=1)),
        stacked(lambda seen: np.mean(seen.drawn, axis=1)),
        None if base.diversity is None else stacked(lambda seen: seen.diversity),
        [TrainingFacts.read(run_folder(comparison, entrant, seed)) for seed in seeds],
        failed,
        [seed for seed in comparison.arguments.seeds if seed not in seeds and seed not in failed],
    )


def _read_base(comparison: Comparison, entrant: Entrant) -> Base:
    (seen,) = Findings.read(base_findings(comparison, entrant)).seen
    own = _pictures(seen, entrant.spec)
    return Base(
        columns={one.name: _column(seen, one) for one in comparison.evaluators},
        spread={one.name: float(np.std(_pictures(seen, one.spec, one.term))) for one in comparison.evaluators},
        own=own.mean(axis=1),
        own_spread=float(own.std()),
        drawn=np.mean(seen.drawn, axis=1),
        diversity=np.array(seen.diversity) if seen.diversity else None,
    )


def _evenly(seen: Sequence[Seen]) -> list[Seen]:
    return sorted(seen, key=lambda one: one.look.updates)


def _column(seen: Seen, evaluator: Evaluator) -> np.ndarray:
    """(P,)."""
    return _pictures(seen, evaluator.spec, evaluator.term).mean(axis=1)


def _pictures(seen: Seen, spec: Spec, term: str | None = None) -> np.ndarray:
    """(P, G); NaN where the reward failed."""
    return np.array(seen.values[spec.key][term or ""]) if spec.key in seen.values else np.full_like(seen.drawn, np.nan)
