"""What a run leaves behind: summary.json, evaluation.json, before_after.png, and a table on the terminal."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from rl.checkpoints import written_beside
from rl.evaluate import Evaluation
from rl.experience import Samples
from rl.pictures import before_after_sheet


def write_report(
    folder: str | Path,
    before: Evaluation,
    after: Evaluation,
    samples: tuple[Samples, Samples],
    facts: Mapping[str, Any],
) -> dict[str, Path]:
    """Write the three files, or, after an error, none of them.

    Args:
        before, after: of the same prompts and noise.
        samples: the same pictures before and after.
        facts: more entries of summary.json.

    Returns:
        What each file is -> its path.
    """
    summary = {"before": before.summary(), "after": after.summary(), **facts}
    every_picture = {
        "prompts": list(before.prompts),
        "before": {name: value.tolist() for name, value in before.values.items()},
        "after": {name: value.tolist() for name, value in after.values.items()},
    }
    names = {
        "figures": "summary.json",
        "figures of every picture": "evaluation.json",
        "pictures": "before_after.png",
    }
    with written_beside(Path(folder)) as beside:
        for name, content in (("summary.json", summary), ("evaluation.json", every_picture)):
            (beside / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
        before_after_sheet(*samples).save(beside / names["pictures"])
    return {what: Path(folder) / name for what, name in names.items()}


def paired_change(before: torch.Tensor, after: torch.Tensor) -> tuple[float, float]:
    """Mean change, and half of its 95% interval (normal approximation) over prompts, of (P, G) and (P, G)."""
    change = (after - before).mean(dim=1)
    if len(change) < 2:
        return float(change.mean()), float("nan")
    return float(change.mean()), float(1.96 * change.std() / len(change) ** 0.5)


def print_table(console: Console, before: Evaluation, after: Evaluation) -> None:
    """Every figure before and after, and its change with a 95% interval over prompts."""
    table = Table(title=f"{len(before.prompts)} held-out prompts, the same noise before and after")
    for heading in ("", "before", "after", "change (95% interval)"):
        table.add_column(heading, justify="left" if not heading else "right")
    rows = dict(sorted(before.values.items()))
    spread = {"diversity": (before.diversity[:, None], after.diversity[:, None])}
    pairs = {name: (value, after.values[name]) for name, value in rows.items()} | spread
    for name, (old, new) in pairs.items():
        if old.isnan().any():
            continue
        change, half_width = paired_change(old, new)
        table.add_row(name, f"{old.mean():.4f}", f"{new.mean():.4f}", f"{change:+.4f} +- {half_width:.4f}")
    console.print(table)
