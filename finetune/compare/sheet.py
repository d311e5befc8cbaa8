"""Do people see it too? Blinded pairs of pictures to choose from, and what was chosen, counted.

A page shows, for a prompt, two policies' pictures from the same noise, left and right by chance; nothing on it says
whose they are. Every held-out prompt is on it once, so all answers are independent. `answers.csv` is to be filled in
with left, right or tie. Who was where lies in another folder, `sheet_keys`: those who answer should not have it.

Each sheet has a folder of its own, named by what is shown in it, and its CSV names that folder. Another sheet goes to
another folder, so no answer is ever lost, or counted for what it was not given to, whatever its file is called.
"""

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import stats

from finetune.compare.config import Comparison
from finetune.compare.folder import base_findings, kept_picture, run_findings
from finetune.compare.pages import render
from finetune.compare.pictures import data_uri
from finetune.compare.results import Trained
from finetune.compare.rewards import BASE
from finetune.compare.verdict import Verdict
from reward.intervals import wilson
from reward.whole_files import write_whole

SHEET, KEYS, ANSWERS = "sheet", "sheet_keys", "answers.csv"
COLUMNS = ("sheet", "pair", "prompt", "answer")
CHOICES = ("left", "right", "tie")
SEPARATORS = (",", ";", "\t")
"""What spreadsheets write between cells; which one depends on the country."""
MOST_BYTES = 8_000_000
"""Of a page, but for a single pair that has more: so many open at once on a phone."""
_NAMED = 5
_FEW = 128  # pixels of a side


@dataclass(frozen=True)
class Counted:
    """How often `one` was preferred to `other`.

    Attributes:
        wins, ties, losses: of `one`.
        rate: of wins, a tie being half of one; `low` and `high` its 95% interval, Wilson's.
        p: of wins against losses, two-sided sign test; None where all were ties.
    """

    one: str
    other: str
    wins: int
    ties: int
    losses: int
    rate: float
    low: float
    high: float
    p: float | None


def write_sheet(comparison: Comparison, results: Sequence[Trained], verdict: Verdict) -> Path:
    """Pages, CSV and key for the pairs that are asked for; the first page's path. A CSV that is there stays as it is.

    Raises:
        ValueError: a pair names no entrant, or one without a finished training; or there is nothing to show.
    """
    pairs = read_pairs(comparison, results, verdict)
    drawn = draw(comparison, pairs, {one.entrant.name: list(one.seeds) for one in results})
    shown = [
        {"pair": row["pair"], "prompt": row["prompt"],
         **{side: _shown(_picture(comparison, row, side)) for side in ("left", "right")}}
        for row in drawn
    ]  # fmt: skip
    digest = hashlib.blake2b(json.dumps([drawn, shown]).encode(), digest_size=4).hexdigest()
    folder = comparison.folder / SHEET / f"sheet_{digest}"  # no spreadsheet takes it for a number
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(
        {"sheet": folder.name, "pair": row["pair"], "prompt": row["prompt"], "answer": ""} for row in drawn
    )
    write_whole(
        comparison.folder / KEYS / f"{folder.name}.json",
        (json.dumps(drawn, indent=1, ensure_ascii=False) + "\n").encode(),
    )
    if not (folder / ANSWERS).exists():
        write_whole(folder / ANSWERS, text.getvalue().encode())
    parts = in_parts(shown, MOST_BYTES)
    files = ["sheet.html", *(f"sheet_{number}.html" for number in range(2, len(parts) + 1))]
    for file, part in zip(files, parts, strict=True):
        content = {"title": "Which picture is better?", "pairs": part, "file": file, "files": files}
        write_whole(folder / file, render("sheet.html.jinja", content).encode())
    return folder / files[0]


def in_parts(shown: Sequence[Mapping[str, Any]], most: int) -> list[list[Mapping[str, Any]]]:
    """`shown` in order, in as few parts as have at most `most` characters of pictures each, or one pair."""
    parts: list[list[Mapping[str, Any]]] = []
    size = 0
    for one in shown:
        own = len(one["left"]) + len(one["right"])
        if not parts or size + own > most:
            parts.append([])
            size = 0
        parts[-1].append(one)
        size += own
    return parts


def read_pairs(comparison: Comparison, results: Sequence[Trained], verdict: Verdict) -> list[tuple[str, str]]:
    """Who is to be shown beside whom.

    Raises:
        ValueError: see `write_sheet`.
    """
    done = [one.entrant.name for one in results if one.seeds]
    if comparison.arguments.sheet_pairs:
        pairs = []
        for text in comparison.arguments.sheet_pairs:
            one, slash, other = text.partition("/")
            for name in (one, other):
                if not slash or name not in (*done, BASE) or one == other:
                    raise ValueError(
                        f"sheet_pairs: {text!r} is no pair; write one/other, of {', '.join([*done, BASE])}, which are "
                        "those with a finished training"
                    )
            pairs.append((one, other))
        return pairs
    by = comparison.decide_by or comparison.evaluators[0].name
    gains = {one.entrant.name: np.mean([*found.values()]) for one in results
             if not one.entrant.upper_bound and (found := one.gains(by) if one.seeds else {})}  # fmt: skip
    names = [*verdict.winners, *sorted(gains, key=gains.get, reverse=True)]
    names = list(dict.fromkeys(names))
    if not names:
        raise ValueError("there is no finished training to show to people yet")
    return [(names[0], BASE)] + ([(names[0], names[1])] if len(names) > 1 else [])


def draw(
    comparison: Comparison, pairs: Sequence[tuple[str, str]], seeds: Mapping[str, Sequence[int]]
) -> list[dict[str, Any]]:
    """Which prompt shows which pair, of which training, and who is left; all by (eval_seed, prompt), so that the same
    settings draw the same.

    The prompts are shuffled and dealt out to the pairs in turn, so each counts once, and the pairs share them evenly.
    """
    prompts, seed = comparison.held_out, comparison.arguments.eval_seed
    order = sorted(range(len(prompts)), key=lambda place: _chance(seed, "order", prompts[place]))
    drawn = []
    for number, place in enumerate(order):
        one, other = pairs[number % len(pairs)]
        both = [each for each in seeds.get(one, seeds.get(other, ())) if all(
            name == BASE or each in seeds[name] for name in (one, other))]  # fmt: skip
        if not both:
            raise ValueError(
                f"{one} and {other} have no finished training of the same seed to be shown beside each other"
            )
        left, right = (one, other) if _chance(seed, "side", prompts[place]) < 0.5 else (other, one)
        which = both[int(_chance(seed, "training", prompts[place]) * len(both))]
        drawn.append({"pair": number + 1, "place": place, "prompt": prompts[place], "seed": which, "left": left,
                      "right": right, "one": one, "other": other})  # fmt: skip
    return drawn


def read_answers(comparison: Comparison, file: str | Path) -> list[dict[str, Any]]:
    """The key's rows with the `answer` that `file` gives each; unanswered ones are left out.

    Raises:
        ValueError: no such file, or not of one of this comparison's sheets; an answer that is none; no answer at all.
    """
    keys = {key.stem: key for key in sorted((comparison.folder / KEYS).glob("*.json"))}
    if not keys:
        raise ValueError(f"{comparison.folder / SHEET} holds no sheet: --sheet writes one, with the CSV to fill in")
    rows, answered, wrong = _rows(Path(file)), {}, []
    named = sorted({str(row["sheet"]).strip() for row in rows})
    if len(named) != 1 or named[0] not in keys:
        raise ValueError(
            f"{file} answers {', '.join(map(repr, named)) or 'no sheet'}; it must answer one of those in "
            f"{comparison.folder / SHEET}: {', '.join(keys)}"
        )
    key = keys[named[0]]
    asked = {str(row["pair"]): row for row in json.loads(key.read_text(encoding="utf-8"))}
    prompts = {row["prompt"] for row in asked.values()}  # a spreadsheet may rewrite one, such as "=)", but not swap two
    for row in rows:
        pair, answer = str(row.get("pair", "")).strip(), str(row.get("answer") or "").strip().lower()
        if pair not in asked or (row["prompt"] != asked[pair]["prompt"] and row["prompt"] in prompts):
            raise ValueError(f"{file}: pair {pair!r}, {row['prompt']!r}, is not of the sheet {key.stem}")
        if pair in answered:
            raise ValueError(f"{file}: pair {pair} is answered twice; each prompt counts once")
        if answer and answer not in CHOICES:
            wrong.append(f"pair {pair}: {row['answer']!r}")
        answered[pair] = answer
    if wrong:
        raise ValueError(f"{file}: answers are {', '.join(CHOICES)}, or empty, but not {'; '.join(wrong[:_NAMED])}")
    found = [asked[pair] | {"answer": answer} for pair, answer in answered.items() if answer]
    if not found:
        raise ValueError(f"{file} holds no answer; write {', '.join(CHOICES)} into the column answer")
    return found


def count_answers(answers: Sequence[Mapping[str, Any]]) -> list[Counted]:
    """Win rates of each pair; pure."""
    found = []
    for one, other in dict.fromkeys((row["one"], row["other"]) for row in answers):
        points = np.array([_points(row) for row in answers if (row["one"], row["other"]) == (one, other)])
        wins, ties, losses = (int((points == value).sum()) for value in (1.0, 0.5, 0.0))
        p = float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else None
        rate = float(points.mean())
        found.append(Counted(one, other, wins, ties, losses, rate, *wilson(rate, len(points)), p))
    return found


def _points(row: Mapping[str, Any]) -> float:
    return 0.5 if row["answer"] == "tie" else float(row[row["answer"]] == row["one"])


def _rows(file: Path) -> list[dict[str, str]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            heading = opened.readline()
            separator = max(SEPARATORS, key=heading.count)
            opened.seek(0)
            reader = csv.DictReader(opened, delimiter=separator)
            rows = list(reader)
    except OSError as error:
        raise ValueError(f"cannot read the answers {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
        raise ValueError(f"{file} lacks the columns {', '.join(missing)}; fill in the answers.csv that --sheet wrote")
    return rows


def _shown(file: Path) -> str:
    """A picture as a page can hold it; of few pixels each counts, and they take little room."""
    picture = Image.open(file)
    return data_uri(picture, lossless=max(picture.size) <= _FEW)


def _picture(comparison: Comparison, row: Mapping[str, Any], side: str) -> Path:
    """One side of a drawn row; the base is what the entrant beside it starts from."""
    name = next(row[each] for each in (side, "left", "right") if row[each] != BASE)
    entrant = comparison.entrant(name)
    is_base = row[side] == BASE
    file = base_findings(comparison, entrant) if is_base else run_findings(comparison, entrant, row["seed"])
    return kept_picture(file, row["place"])


def _chance(*key: object) -> float:
    """In [0, 1), by a key and nothing else."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
