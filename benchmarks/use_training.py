"""A training of `benchmarks/uses.py`: one of the toolkit's commands, and what it cost.

    python benchmarks/use_training.py FOLDER

Its seconds are the processor's, of the whole command, start included: on one thread they are the wall's, and what runs
beside it does not count.
"""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from parts import Task

RUN, SELECTION = "run", "selection"
"""Where in its folder a training's output goes, or a selection's."""


def train(task: Task) -> dict[str, Any]:
    """One command, its output in the part's folder; `{folder}` and `{need}` in it stand for the folders' paths."""
    command = [at_home(word, task) for word in task.how["command"]]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(seconds, 1), "pictures": drawn_for(task)}


def at_home(word: str, task: Task) -> str:
    word = word.replace("{folder}", str(task.folder))
    return word.replace("{need}", str(task.needs[0])) if task.needs else word


def drawn_for(task: Task) -> int:
    """How many pictures a training had drawn for it."""
    if (report := task.folder / SELECTION / "selection.json").is_file():
        return json.loads(report.read_text(encoding="utf-8"))["pictures"]
    return pictures_of(task.folder / RUN) if task.how["draws"] else 0


def pictures_of(folder: Path) -> int:
    """How many pictures a run had drawn, from its settings: with a region constraint the base draws each too, and of
    several draws of the last step each is a picture."""
    settings = json.loads((folder / "run_config.json").read_text())
    finished = json.loads((folder / "finished.json").read_text())
    if "generation_batch_size" in settings:
        return int(settings["num_train_epochs"]) * settings["generation_batch_size"]
    per_update = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    draws = settings["lv_draws"] if settings["variant"] == "draft_lv" else 1
    return finished["updates"] * per_update * settings["processes"] * draws * (2 if settings["region_weight"] else 1)


if __name__ == "__main__":
    task = Task.read(Path(sys.argv[1]))
    task.finish(train)
