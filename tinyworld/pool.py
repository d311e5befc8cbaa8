"""The pictures that the generator is trained on, drawn once and kept on disk."""

from pathlib import Path

import numpy as np

from tinyworld.scenes import SIZE, draw_scene

COUNT = 100_000
FLAWED = 0.3
_CHUNK = 1000


def make_pool(folder: Path, flawed: float, seed: int, count: int = COUNT) -> tuple[np.ndarray, list[str]]:
    """(count, 64, 64, 3) uint8 pictures, mapped from disk, and their captions; drawn on the first call.

    Args:
        flawed: share of the pictures that carry one flaw.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures_file, captions_file = folder / "pictures.npy", folder / "captions.txt"
    if not captions_file.exists():
        part = folder / "pictures.part.npy"
        pictures = np.lib.format.open_memmap(part, "w+", np.uint8, (count, SIZE, SIZE, 3))
        captions = []
        for start in range(0, count, _CHUNK):
            rng = np.random.default_rng((seed, start))
            for index in range(start, min(start + _CHUNK, count)):
                request, pictures[index] = draw_scene(rng, flawed)
                captions.append(str(request))
        pictures.flush()
        part.replace(pictures_file)
        captions_file.with_suffix(".part").write_text("\n".join(captions))
        captions_file.with_suffix(".part").replace(captions_file)
    return np.load(pictures_file, mmap_mode="r"), captions_file.read_text().split("\n")
