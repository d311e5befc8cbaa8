"""The folder of a comparison: what is where in it, and whether it may be used.

comparison.json              its settings; another start with others is refused
base/<key>/findings.json     what the evaluators say of the policy before training; pictures/ beside it
agreement/agreement.json     what all rewards say of the same pictures, by `finetune.agreement`; or failure.json
runs/<entrant>/seed<N>/      a training, as its own command leaves it; beside that, facts.json, findings.json and
                             pictures/, or failure.json
sheet/<name>/                blinded pages for people, with a CSV to fill in
sheet_keys/<name>.json       who is who on them
report.html, report.md, report.json
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.compare.config import Comparison
from finetune.compare.entrants import Entrant, run_flags
from finetune.compare.evaluate import Findings
from finetune.compare.rewards import Spec
from finetune.fingerprints import is_weights
from reward.whole_files import write_whole
from rl.checkpoints import differing_keys

SETTINGS, AGREEMENT = "comparison.json", "agreement/agreement.json"
FINDINGS, FAILURE = "findings.json", "failure.json"


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
    unshared = {key for key in before.keys() ^ now.keys() if is_weights(key)}  # of entrants that are added or left out
    before, now = (
        {
            key: value
            for key, value in settings.items()
            if (_entrant(key) is None or _entrant(key) in both) and key not in unshared
        }
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


def unasked(comparison: Comparison, entrant: Entrant) -> list[Spec]:
    """The rewards that are to judge an entrant's policy before training, and have not yet."""
    file = base_findings(comparison, entrant)
    known = set(Findings.read(file).seen[0].values) if file.is_file() else set()
    return [spec for spec in comparison.specs(entrant.base) if spec.key not in known]


def run_folder(comparison: Comparison, entrant: Entrant, seed: int) -> Path:
    return comparison.folder / "runs" / entrant.folder / f"seed{seed}"


def run_findings(comparison: Comparison, entrant: Entrant, seed: int) -> Path:
    return run_folder(comparison, entrant, seed) / FINDINGS


def kept_picture(findings: Path, prompt: int) -> Path:
    """The first picture of a prompt, by its place among the held-out ones, that `findings` were made of."""
    return findings.with_name("pictures") / f"{prompt:05}.png"


def is_judged(comparison: Comparison, entrant: Entrant, seed: int) -> bool:
    """Whether all rewards have judged a training."""
    file = run_findings(comparison, entrant, seed)
    return file.is_file() and not Findings.read(file).failed


def run_failure(comparison: Comparison, entrant: Entrant, seed: int) -> Path:
    return run_folder(comparison, entrant, seed) / FAILURE


def agreement_failure(comparison: Comparison) -> Path:
    return (comparison.folder / AGREEMENT).with_name(FAILURE)


def training_command(comparison: Comparison, entrant: Entrant, seed: int) -> list[str]:
    """What trains an entrant, behind `python -m`; anyone may run it by hand."""
    return [entrant.command, *run_flags(comparison, entrant, seed, run_folder(comparison, entrant, seed))]
