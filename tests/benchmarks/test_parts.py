"""Parts are done once, in order, behind what they need; and one that fails takes nothing with it."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import parts
import pytest
from long_runs import Budget, write_json
from parts import RESULT, Part, PartFailedError, do, finish, with_needs

from finetune.fingerprints import code


def chain():
    first = Part("first", 0, "script.py", {})
    second = Part("second", 0, "script.py", {}, (first,))
    return first, second, Part("third", 0, "script.py", {}, (second,)), Part("alone", 0, "script.py", {})


@pytest.fixture
def started():
    """Does parts in no time; `names` are those that were started, in order."""

    def start(part, work):
        start.names.append(part.name)
        assert all(need.result(work) for need in part.needs)
        if part.name == "fails":
            raise PartFailedError("because")
        write_json(part.folder(work) / RESULT, {"wall": 1.0, "of": part.name})

    start.names = []
    return start


def test_another_part_is_another_folder(tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text("a: 1")
    need = Part("need", 0, "script.py", {})
    one = Part("One, two", 0, "script.py", {"a": 1}, (need,), (str(config),))
    assert one.key == Part("One, two", 0, "script.py", {"a": 1}, (need,), (str(config),)).key
    assert one.folder(tmp_path).parent.name == "seed0"
    assert one.folder(tmp_path).name == f"one_two-{one.key}"
    others = [replace(one, how={"a": 2}), replace(one, seed=1), replace(one, needs=(replace(need, how={"b": 1}),))]
    assert len({part.key for part in [one, *others]}) == 4
    before = one.key
    config.write_text("# of what a stays\na:   1\noutput_dir: elsewhere")
    assert replace(one).key == before
    config.write_text("a: 2")
    assert replace(one).key != before


def test_needs_come_first_and_once(tmp_path, started):
    first, second, third, alone = chain()
    assert with_needs([third, second, alone]) == [first, second, third, alone]
    done = finish([third, alone, second, first], tmp_path, 1, Budget(None), started)
    assert started.names == ["alone", "first", "second", "third"]  # the first one whose needs are done
    assert [result["of"] for result in done.values()] == ["third", "alone", "second", "first"]


def test_what_is_done_is_not_done_again(tmp_path, started):
    finish(chain()[:2], tmp_path, 1, Budget(None), started)
    assert len(finish(chain(), tmp_path, 1, Budget(None), started)) == 4
    assert started.names == ["first", "second", "third", "alone"]


def test_two_run_beside_each_other_but_for_their_needs(tmp_path):
    running, most, lock = set(), [], threading.Lock()

    def start(part, work):
        with lock:
            assert not {"first", "second"} <= running | {part.name}
            running.add(part.name)
            most.append(len(running))
        time.sleep(0.05)
        write_json(part.folder(work) / RESULT, {"wall": 0.05})
        with lock:
            running.discard(part.name)

    assert len(finish(chain(), tmp_path, 2, Budget(None), start)) == 4
    assert max(most) == 2


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_part_that_fails_takes_with_it_what_needs_it_alone(tmp_path, started, jobs):
    first, second, *_ = chain()
    fails = Part("fails", 3, "script.py", {})
    behind = Part("behind", 3, "script.py", {}, (fails,))
    parts = [fails, behind, Part("far behind", 3, "script.py", {}, (behind,)), first, second]
    with pytest.raises(SystemExit, match=r"^fails, seed 3, failed; what is done is kept\. because$"):
        finish(parts, tmp_path, jobs, Budget(None), started)
    assert sorted(started.names) == ["fails", "first", "second"]
    failures = []
    done = finish(parts, tmp_path, jobs, Budget(None), started, failures)
    assert [part.name for part in done] == ["first", "second"]
    assert failures == ["fails, seed 3, failed; what is done is kept. because"]


def test_no_budget_starts_nothing(tmp_path, started):
    assert finish(chain(), tmp_path, 2, Budget(-1), started) == {}
    assert started.names == []


SCRIPT = """
import sys
from pathlib import Path
from parts import Task
task = Task.read(Path(sys.argv[1]))
if task.how.get("fails"):
    sys.exit("what went wrong")
if not task.how.get("forgets"):
    task.finish(lambda told: {"told": [told.seed, told.how, [str(need) for need in told.needs]]})
"""


def test_a_part_is_a_process_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setattr("parts.SCRIPTS", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(parts.__file__).parent))
    need = Part("need", 0, "script.py", {})
    part = Part("part", 7, "script.py", {"x": 1}, (need,))
    left = part.folder(tmp_path)
    left.mkdir(parents=True)
    (left / "half.txt").write_text("of a run that was killed")
    do(part, tmp_path)
    result = part.result(tmp_path)
    assert result["code"] == code()
    assert result["told"] == [7, {"x": 1}, [str(need.folder(tmp_path))]]
    assert result["wall"] >= 0
    assert not (left / "half.txt").exists()
    with pytest.raises(SystemExit, match=r"fails, seed 0, failed; what is done is kept(.|\n)*ends with:\nwhat went"):
        finish([Part("fails", 0, "script.py", {"fails": 1})], tmp_path, 1, Budget(None))
    with pytest.raises(SystemExit, match=r"has no part\.json"):
        finish([Part("forgets", 0, "script.py", {"forgets": 1})], tmp_path, 1, Budget(None))


GOES_ON = """
import os, sys, time
from pathlib import Path
begins = Path(sys.argv[1], "begins")
begins.write_text(str(os.getpid()))
begins.rename(begins.with_name("begun"))
time.sleep(60)
"""


def test_a_part_whose_process_outlived_its_parent_is_not_begun_beside_it(tmp_path, monkeypatch):
    """Two of them would write to one folder."""
    (tmp_path / "script.py").write_text(GOES_ON)
    part = Part("part", 0, "script.py", {})
    paths = os.pathsep.join([str(Path(parts.__file__).parent), str(parts.ROOT)])
    told = f"import parts; from pathlib import Path; parts.SCRIPTS = Path({str(tmp_path)!r}); " \
           f"parts.do(parts.Part('part', 0, 'script.py', {{}}), Path({str(tmp_path)!r}))"  # fmt: skip
    parent = subprocess.Popen([sys.executable, "-c", told], env=os.environ | {"PYTHONPATH": paths})
    begun = part.folder(tmp_path) / "begun"
    until = time.monotonic() + 60
    while not begun.exists() and time.monotonic() < until:
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    monkeypatch.setattr("parts.SCRIPTS", tmp_path)
    try:
        with pytest.raises(PartFailedError, match="a process of an earlier start still does it"):
            do(part, tmp_path)
        assert begun.exists()
    finally:
        os.kill(int(begun.read_text()), signal.SIGKILL)
