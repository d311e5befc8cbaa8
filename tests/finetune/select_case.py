"""How the tests of choosing pictures call the command, and read what it leaves."""

import json

import pytest

from finetune import select
from reward.arguments import main_guard


def command(*argv):
    """Exit code of `python -m finetune.select argv`, in this process."""
    with pytest.raises(SystemExit) as caught:
        main_guard(select.main, [str(part) for part in argv])
    return caught.value.code


def flags(**settings):
    settings["rules"] = json.dumps(settings["rules"])
    return [part for name, value in settings.items() for part in (f"--{name}", value)]


def lines_of(folder):
    return (folder / "metadata.jsonl").read_text().splitlines()


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}
