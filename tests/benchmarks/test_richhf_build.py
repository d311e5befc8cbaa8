"""What the benchmark generates is what the command reads."""

import sys

import numpy as np
import pytest
import richhf_build

from reward.pictures import decode
from reward.records import SPLITS, read_tfrecords
from reward.sources import open_source

SIZES = {"train": 3, "dev": 2, "test": 1}


@pytest.mark.parametrize("kind", richhf_build.KINDS)
def test_every_record_has_its_picture(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(richhf_build, "DISTINCT", 2)
    monkeypatch.setattr(richhf_build, "ROW_GROUP", 4)
    rng = np.random.default_rng(0)
    richhf_build.write_records(tmp_path / "records", SIZES, rng)
    richhf_build.write_source(kind, tmp_path / "source", SIZES, rng)
    for split in SPLITS:
        wanted = {record.uid for record in read_tfrecords(tmp_path / "records" / f"{split}.tfrecord")}
        found = list(open_source(tmp_path / "source").pictures(wanted))
        assert sorted(picture.uid for picture in found) == sorted(wanted)
        assert len(found) == SIZES[split]
        assert {decode(picture.data).size for picture in found} == {(512, 512)}


def test_memory_of_a_process_is_its_own():
    _, small = richhf_build.cost([sys.executable, "-c", "pass"])
    _, large = richhf_build.cost([sys.executable, "-c", "x = bytearray(200 * 2**20)"])
    assert 0.15 < large - small < 0.25
    _, again = richhf_build.cost([sys.executable, "-c", "pass"])
    assert abs(again - small) < 0.02
    with pytest.raises(RuntimeError, match="exit code 3"):
        richhf_build.cost([sys.executable, "-c", "raise SystemExit(3)"])
