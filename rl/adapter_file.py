"""The adapter's file: the same weights are the same bytes."""

import json
from pathlib import Path

_METADATA = "__metadata__"


def sort_metadata(file: Path) -> None:
    """Rewrite a safetensors file with the metadata of its header in alphabetical order.

    safetensors writes them in a random one, so that the same weights, saved twice, would not compare equal as files.
    The format: 8 bytes, the header's length N (little-endian); N bytes of JSON, padded with spaces; the tensors.
    """
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header = {_METADATA: dict(sorted(header.pop(_METADATA, {}).items())), **header}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])
