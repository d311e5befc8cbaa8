import pytest

from rl.engines import prepare_deepspeed_on_cpu


@pytest.mark.parametrize("left", ["loading", ""])
def test_lock_of_a_killed_process_is_removed_and_that_of_a_living_one_is_not(left, monkeypatch, tmp_path):
    """What a process that was killed while it loaded DeepSpeed's op leaves: torch's lock, and a word in our own."""
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    folder, found = tmp_path / ShareMemCommBuilder.NAME, []
    folder.mkdir()
    (folder / "lock").write_text("")
    (folder / "loading").write_text(left)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")

    def load(builder, verbose):
        found.append(((folder / "lock").exists(), (folder / "loading").read_text()))

    monkeypatch.setattr(ShareMemCommBuilder, "load", load)
    prepare_deepspeed_on_cpu()
    assert found == [(not left, "loading")]
    assert (folder / "loading").read_text() == ""
