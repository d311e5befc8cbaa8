"""What holds for all tests."""

import gc
import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported: no test asks the hub


def pytest_collection_finish():
    """Leave alone, from here on, what has been imported: it stays until the end.

    Every `Trainer` collects garbage as it begins, which would look through all of it, half a second each time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_sync(monkeypatch):
    """Files need not be on the disk when a test ends, and waiting until they are, for a dozen of every checkpoint, is
    much of a run as small as these. That they are synced is `tests/rl/test_synced.py`'s, which has this fixture do
    nothing."""
    monkeypatch.setattr("rl.checkpoints._sync", lambda path: None)
