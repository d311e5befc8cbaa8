import os

import pytest

from reward.whole_files import BEFORE, bring_back, forget, set_aside, whole_file, write_whole


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def umask():
    os.umask(mask := os.umask(0))
    return mask


def test_a_file_takes_its_place_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "x"
    write_whole(path, b"old")
    with whole_file(path) as file:
        file.write(b"ne")
        file.flush()
        assert path.read_bytes() == b"old"
        assert path.stat().st_ino != os.fstat(file.fileno()).st_ino
        file.write(b"w")
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["x"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, call=call: (done.append(name), call(*args)))
    write_whole(tmp_path / "x", b"new")
    assert done == ["fsync", "replace"]


def write_half(file, kind):
    file.write(b"half")
    raise kind


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError])
def test_after_an_error_what_was_there_is_unharmed(tmp_path, kind):
    write_whole(tmp_path / "x", b"old")
    with pytest.raises(kind), whole_file(tmp_path / "x") as file:
        write_half(file, kind)
    assert (tmp_path / "x").read_bytes() == b"old"
    assert names(tmp_path) == ["x"]


def test_a_full_disk_is_told_with_the_files_name(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    write_whole(tmp_path / "x", b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*/x: No space left on device; what .* is kept"):
        write_whole(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"old"
    assert names(tmp_path) == ["x"]


def fill(folder, content):
    (folder / "logs").mkdir(exist_ok=True)
    for name in ("config", "weights", "logs/first"):
        (folder / name).write_text(content)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def run(tmp_path):
    fill(tmp_path, "old")
    (tmp_path / "notes").write_text("mine")
    return tmp_path


def written(folder):
    return [folder / name for name in ("config", "weights", "logs")]


def test_what_was_set_aside_comes_back_in_place_of_what_came_since(run):
    before = contents(run)
    set_aside(run, written(run))
    assert names(run) == [BEFORE, "notes"]
    fill(run, "new")
    (run / "logs" / "second").touch()
    bring_back(run)
    assert contents(run) == before
    assert names(run) == ["config", "logs", "notes", "weights"]
    bring_back(run)
    assert contents(run) == before


def test_what_was_set_aside_is_forgotten_at_once_and_for_good(run, monkeypatch):
    set_aside(run, written(run))
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *args, **kwargs: None)  # killed before it deleted anything
        forget(run)
    bring_back(run)
    assert names(run) == ["notes"]
    forget(run)


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_killed_on_the_way_nothing_is_lost(run, monkeypatch, moves):
    """Be it when things are set aside or when they come back."""
    before, replace, left = contents(run), os.replace, moves

    def killed(*args):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        replace(*args)

    for action in (lambda: set_aside(run, written(run)), lambda: bring_back(run)):
        left = moves
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed)
            with pytest.raises(KeyboardInterrupt):
                action()
        bring_back(run)
        assert contents(run) == before
        set_aside(run, written(run))


def test_nothing_there_is_nothing_set_aside(tmp_path):
    set_aside(tmp_path / "out", [])
    bring_back(tmp_path / "out")
    forget(tmp_path / "out")
    assert not (tmp_path / "out").exists()
