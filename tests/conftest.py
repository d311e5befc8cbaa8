"""What holds for all tests."""

import gc


def pytest_collection_finish():
    """Leave alone, from here on, what has been imported: it stays until the end.

    Every `Trainer` collects garbage as it begins, which would look through all of it, half a second each time.
    """
    gc.collect()
    gc.freeze()
