"""The report of a selection: how many pictures each rule kept, histograms with the thresholds, grids of pictures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.table import Table

from finetune.pool import Pool
from finetune.predictions import Predictions, read_pictures
from finetune.rules import BestOf, Quantile, Step, Threshold, leaves
from reward.draw import caption, grid, overlay, struck_text, to_image
from reward.feedback import HEATMAPS
from reward.report_figure import save_png

REPORT = "selection.json"
HISTOGRAMS, KEPT, REJECTED = "histograms.png", "kept.png", "rejected.png"
_HEIGHT, _COLUMNS = 128, 4


def print_steps(console: Console, steps: Sequence[Step]) -> None:
    """A row for each rule: what it asked for, how many pictures it was asked about, and how many it kept."""
    table = Table(title="rules, each on what the one before it kept")
    for heading in ("rule", "", "of", "kept", ""):
        table.add_column(heading, justify="left" if heading in ("rule", "") else "right")
    for step in steps:
        share = f"{len(step.kept) / len(step.asked):.1%}"
        table.add_row(step.name, str(step.rule), str(len(step.asked)), str(len(step.kept)), share)
    console.print(table, markup=False)


def write_report(
    folder: Path,
    pool: Pool,
    predictions: Predictions,
    steps: Sequence[Step],
    settings: Mapping[str, Any],
    examples: int,
) -> None:
    """Write `selection.json`, `histograms.png`, `kept.png` and, where a picture was rejected, `rejected.png`."""
    kept = steps[-1].kept
    facts = {
        "pictures": len(predictions),
        "kept": len(kept),
        "prompts": len(set(predictions.prompts)),
        "prompts_kept": len({predictions.prompts[place] for place in kept}),
        "rules": [
            {"name": step.name, "rule": str(step.rule), "of": len(step.asked), "kept": len(step.kept)} for step in steps
        ],
        "means": {
            name: {"all": float(values.mean()), "kept": float(values[kept].mean())}
            for name, values in predictions.values.items()
        },
        "settings": settings,
    }
    (folder / REPORT).write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")
    if panels := histograms(steps, predictions):
        save_png(panels, folder / HISTOGRAMS)
    rejected_by = {int(place): step for step in steps for place in step.removed}
    rejected = np.array(sorted(rejected_by))
    shown = evenly(kept, examples)
    sheet(pool, predictions, shown, [""] * len(shown)).save(folder / KEPT)
    if len(rejected):
        shown = evenly(rejected, examples)
        reasons = [reason(rejected_by[int(place)], predictions, int(place)) for place in shown]
        sheet(pool, predictions, shown, reasons).save(folder / REJECTED)


def histograms(steps: Sequence[Step], predictions: Predictions) -> Figure | None:
    """For each threshold of each rule, the values of the pictures that it was asked about, and where it cuts; None if
    no rule has one."""
    panels = [
        (step, leaf) for step in steps for leaf in leaves(step.rule) if isinstance(leaf, Threshold | Quantile | BestOf)
    ]
    if not panels:
        return None
    figure = Figure(figsize=(6, 2.6 * len(panels)), layout="constrained")
    for axes, (step, leaf) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        values = leaf.value.of(predictions)
        bins = np.histogram_bin_edges(values[step.asked], bins=40)
        axes.hist(values[step.asked], bins=bins, color="0.75", label=f"asked about: {len(step.asked)}")
        axes.hist(values[step.kept], bins=bins, color="tab:blue", alpha=0.7, label=f"kept: {len(step.kept)}")
        edges = () if isinstance(leaf, BestOf) else leaf.bounds(predictions, step.asked)
        for edge in edges:
            if edge is not None:
                axes.axvline(edge, color="tab:red", linewidth=1.5)
        axes.set_title(f"{step.name}: {leaf}", fontsize=9, parse_math=False)
        axes.set_xlabel(str(leaf.value), fontsize=8)
        axes.set_ylabel("pictures", fontsize=8)
        axes.legend(fontsize=7)
    return figure


def sheet(pool: Pool, predictions: Predictions, places: Sequence[int], notes: Sequence[str]) -> Image.Image:
    """Pictures with their overlays, prompts with the misaligned words struck out, scores, and a note each."""
    columns = [
        _column(image, predictions, int(place), note)
        for image, place, note in zip(read_pictures(pool, places), places, notes, strict=True)
    ]
    return grid([columns[start : start + _COLUMNS] for start in range(0, len(columns), _COLUMNS)], gap=8)


def reason(step: Step, predictions: Predictions, place: int) -> str:
    """Why a step rejected a picture, in words."""
    values = {
        f"{leaf.value} {leaf.value.of(predictions)[place]:.3g}": None
        for leaf in leaves(step.rule)
        if isinstance(leaf, Threshold | Quantile | BestOf)
    }
    return f"{step.name}: {', '.join(values) or step.rule}"


def evenly(places: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of `places`, evenly spread: of 10 and 4, those at 0, 2, 5 and 7."""
    count = min(count, len(places))
    return places[[index * len(places) // count for index in range(count)]]


def _column(image: torch.Tensor, predictions: Predictions, place: int, note: str) -> Image.Image:
    picture = image.float() / 255
    drawn = to_image(picture, _HEIGHT)
    maps = [
        overlay(picture, torch.from_numpy(predictions.maps[name][place]).float() / 255, name, _HEIGHT)
        for name in HEATMAPS
    ]
    row = grid([[drawn, *maps]], gap=2)
    words = struck_text(
        predictions.tokens[place], predictions.misaligned[place].tolist(), row.width, predictions.word_threshold
    )
    scores = "   ".join(f"{name} {values[place]:.2f}" for name, values in predictions.values.items())
    parts = [row, words, caption(scores, row.width, size=9)]
    return grid([[part] for part in [*parts, *([caption(note, row.width)] if note else [])]], gap=2)
