"""What other people's files may hold that no command can work with: said in one line, and before the work begins."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset
from safetensors import SafetensorError, safe_open

from reward.feedback import HEATMAPS, SCORES
from reward.pictures import decode, to_rgb

PICTURES = ("image", *(f"{name}_map" for name in HEATMAPS))
"""Columns of a data set that hold encoded pictures."""

_BROKEN = (OSError, SyntaxError, ValueError)  # what Pillow raises
_NAMED = 5


def check_labels(rows: Dataset, where: str) -> None:
    """Refuse scores outside [0, 1] or NaN, word labels other than 0 and 1, or not one for each token.

    No picture is decoded; columns that are not there are not asked for.

    Args:
        where: the data's name in the message.

    Raises:
        ValueError: with the first such row's uid and the number of such rows.
    """
    for name in (name for name in SCORES if name in rows.column_names):
        values = np.array(rows[name][:], dtype=np.float64)
        wrong = np.flatnonzero(~((values >= 0) & (values <= 1)))
        if wrong.size:
            _refuse(rows, wrong, f"{name} is {values[wrong[0]]:.6g}, not in [0, 1]", where)
    if "keyword_labels" not in rows.column_names:
        return
    labels = rows["keyword_labels"][:]
    if wrong := [place for place, one in enumerate(labels) if one is None or not set(one) <= {0, 1}]:
        _refuse(rows, wrong, f"keyword_labels are {labels[wrong[0]]}, not 0 or 1", where)
    if "tokens" in rows.column_names:
        tokens = rows["tokens"][:]
        if wrong := [place for place, one in enumerate(labels) if len(one) != len(tokens[place] or ())]:
            what = f"{len(labels[wrong[0]])} keyword_labels for {len(tokens[wrong[0]] or ())} tokens"
            _refuse(rows, wrong, what, where)


def read_row(rows: Dataset, index: int) -> dict:
    """One row with its pictures decoded.

    Raises:
        ValueError: one of them is missing or cannot be decoded; with the row's uid and the column.
    """
    try:
        row = rows[index]
    except _BROKEN as error:
        raise ValueError(f"{_picture_named(rows, index)} cannot be decoded; build the data anew") from error
    if missing := [name for name in PICTURES if name in row and row[name] is None]:
        raise ValueError(f"the {missing[0]} of {_uid(rows, index)} is missing; build the data anew")
    return row


def read_rows(rows: Dataset) -> Iterator[dict]:
    """Every row as `read_row` gives it, in order."""
    return (read_row(rows, index) for index in range(len(rows)))


def check_pictures(files: Sequence[str | Path]) -> None:
    """Refuse picture files that are missing or do not decode.

    Raises:
        ValueError: names them, five at most, and why the first one does not.
    """
    wrong, first = [], ""
    for file in map(Path, files):
        try:
            to_rgb(decode(file.read_bytes()))
        except FileNotFoundError:
            wrong.append(file)
            first = first or f"there is no image {file}"
        except (ValueError, OSError) as error:
            wrong.append(file)
            first = first or f"{file} is not an image that can be read: {error}"
    if len(wrong) > 1:
        more = ", ..." if len(wrong) > _NAMED else ""
        first += f" ({len(wrong)} of {len(files)} are wrong: {', '.join(map(str, wrong[:_NAMED]))}{more})"
    if wrong:
        raise ValueError(first)


def check_place(place: Path, what: str, folder: bool = True) -> None:
    """Refuse a place for results that cannot be made there; nothing is made yet.

    Args:
        what: the setting's name in the message.
        folder: whether a folder is to be made, or else a file; either may be there already.

    Raises:
        ValueError: a file is where a folder is to be, or the other way round.
    """
    there = next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())
    if there.is_dir():
        if there == place.absolute() and not folder:
            raise ValueError(f"{what} {place} is a folder; name a file")
    elif there != place.absolute():
        raise ValueError(f"{what} {place} cannot be made: {there} is a file")
    elif folder:
        raise ValueError(f"{what} {place} is a file; name a folder")


def check_new_folder(given: str | Path, what: str) -> Path:
    """A folder that results are to become at once, when they are whole: where it will be, links followed.

    Args:
        what: the setting's name in the message.

    Raises:
        ValueError: it is not empty, or cannot be replaced by another (a file, the folder one is in, a mount point).
    """
    place = Path(given).resolve()
    check_place(place, what)
    if place.is_dir():
        if any(place.iterdir()):
            raise ValueError(f"{given} is not empty; give a folder that does not exist yet")
        if place == Path.cwd() or place.is_mount():
            why = "the folder you are in" if place == Path.cwd() else "a mount point"
            raise ValueError(f"{what} {given} is {why}, which cannot be replaced; name a folder in it")
    return place


def model_type(folder: Path) -> str | None:
    """The `model_type` that a checkpoint's `config.json` states; None if there is no such file or it is none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config.get("model_type") if isinstance(config, dict) else None


def check_weights(folder: Path) -> None:
    """Refuse a checkpoint whose safetensors files, or some of them, are missing or cut off; no weights are read.

    Raises:
        ValueError: names the file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no weights (model.safetensors); was the training stopped before it saved?")
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        try:
            parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is no list of a checkpoint's files; fetch or save it again") from error
        if missing := [name for name in parts if not (folder / name).is_file()]:
            raise ValueError(
                f"{folder} lacks {', '.join(missing[:_NAMED])} ({len(missing)} of {len(parts)} files of weights are "
                "missing); fetch or save it again"
            )
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is no whole safetensors file ({error}); fetch or save it again") from error


def _refuse(rows: Dataset, wrong: Sequence[int], what: str, where: str) -> None:
    more = f" ({len(wrong)} such rows)" if len(wrong) > 1 else ""
    raise ValueError(f"{where}: picture {_uid(rows, int(wrong[0]))}: {what}{more}")


def _picture_named(rows: Dataset, index: int) -> str:
    """The first picture of a row that does not decode, in words."""
    for name in (name for name in PICTURES if name in rows.column_names):
        try:
            rows.select_columns([name])[index]
        except _BROKEN:
            return f"the {name} of {_uid(rows, index)}"
    return f"a picture of {_uid(rows, index)}"


def _uid(rows: Dataset, index: int) -> str:
    return rows.select_columns(["uid"])[index]["uid"] if "uid" in rows.column_names else f"row {index}"
