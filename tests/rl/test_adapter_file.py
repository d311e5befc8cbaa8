import json

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rl.adapter_file import sort_metadata

WEIGHTS = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor([1, 2], dtype=torch.int64)}
METADATA = {"format": "pt", "lora": json.dumps({"grün": 'a "quoted" word', "rank": 2}, indent=1), "z": "", "y": "1"}


def saved(file, names):
    """The weights, with the metadata in the order of `names`."""
    save_file(WEIGHTS, file)
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = {"__metadata__": {name: METADATA[name] for name in names}, **json.loads(data[8:start])}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])
    return file


def test_order_of_the_metadata_makes_no_other_file(tmp_path):
    files = [saved(tmp_path / "one", list(METADATA)), saved(tmp_path / "two", list(METADATA)[::-1])]
    assert files[0].read_bytes() != files[1].read_bytes()
    for file in files:
        sort_metadata(file)
    assert files[0].read_bytes() == files[1].read_bytes()
    read = load_file(files[0])
    assert all(torch.equal(read[name], WEIGHTS[name]) for name in WEIGHTS)
    with safe_open(files[0], "pt") as opened:
        assert opened.metadata() == METADATA


def test_what_safetensors_wrote_stays_what_it_is(tmp_path):
    for metadata in (None, {"format": "pt"}):
        save_file(WEIGHTS, tmp_path / "file", metadata=metadata)
        sort_metadata(tmp_path / "file")
        assert int.from_bytes((tmp_path / "file").read_bytes()[:8], "little") % 8 == 0
        assert load_file(tmp_path / "file").keys() == WEIGHTS.keys()
