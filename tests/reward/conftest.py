"""A world of a few kilobytes: tokenizer, model, pictures and records, all made here."""

import io
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, T5Config, ViTConfig

from reward import richhf
from reward.feedback import HEATMAPS, SCORES
from reward.model import RahfModel
from reward.predict import RichFeedbackPredictor
from reward.rahf_config import RahfConfig
from reward.records import Record, encode_map, write_tfrecords

WORDS = ("a", "red", "blue", "circle", "square", "left", "of", "and")


@pytest.fixture  # anew for each test: adopting it adds words
def tokenizer():
    vocabulary = {word: index for index, word in enumerate(("<pad>", "</s>", "<unk>", "<mask>", *WORDS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", mask_token="<mask>"
    )


@pytest.fixture
def make_config():
    def make(**options):
        vision = ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=32,
            patch_size=8,
            hidden_dropout_prob=0.0,
        )
        text = T5Config(
            vocab_size=20,
            d_model=24,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_decoder_layers=1,
            num_heads=2,
            dropout_rate=0.0,
        )
        settings = {"head_width": 0.25, "max_text_length": 16, **options}
        return RahfConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), **settings)

    return make


@pytest.fixture
def model(make_config):
    torch.manual_seed(0)
    return RahfModel(make_config()).eval()


@pytest.fixture
def predictor(model, tokenizer):
    return RichFeedbackPredictor(model, tokenizer)


@pytest.fixture
def model_folder(model, tokenizer, tmp_path):
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _picture_bytes(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def _make_record(uid, words, rng, split="train"):
    """A random record; half of the maps are empty, as in the real data."""
    maps = {}
    for name in HEATMAPS:
        heatmap = np.zeros((32, 32))
        if rng.random() < 0.5:
            y, x = rng.integers(0, 24, 2)
            heatmap[y : y + 8, x : x + 8] = 2 / 3
        maps[name] = encode_map(heatmap)
    scores = {name: float(np.float32(rng.random())) for name in SCORES}
    labels = [int(label) for label in rng.integers(0, 2, words)]
    return Record(filename=f"{split}/{uid}.png", scores=scores, maps=maps, labels=labels)


@pytest.fixture
def picture_bytes():
    return _picture_bytes


@pytest.fixture
def make_record():
    return _make_record


@cache
def _raw_files():
    """name -> bytes of the files of `raw_data`. Its pictures take a while, so they are drawn once, and written for each
    test that may change them."""
    rng = np.random.default_rng(0)
    rows = []
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for split, count in (("train", 12), ("dev", 6), ("test", 6)):
            records = []
            for index in range(count):
                uid = f"{split}-{index}"
                caption = ["A red circle.", "a blue square, left of a circle", "red"][index % 3]
                words = [3, 7, 1][index % 3]
                records.append(_make_record(uid, words, rng, split))
                side = index % 2
                pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                rows.append(
                    {
                        f"image_{side}_uid": uid,
                        f"image_{1 - side}_uid": f"other-{uid}",
                        f"jpg_{side}": _picture_bytes(pixels),
                        f"jpg_{1 - side}": b"not looked at",
                        "caption": caption,
                    }
                )
            write_tfrecords(folder / "tfrecords" / f"{split}.tfrecord", records)
        (folder / "images").mkdir()
        for shard in range(2):
            table = pyarrow.Table.from_pylist(rows[shard::2])
            pyarrow.parquet.write_table(table, folder / "images" / f"{shard}.parquet", row_group_size=4)
        return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def _write_raw(folder):
    for name, content in _raw_files().items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def raw_data(tmp_path):
    """Folders `tfrecords` and `images` in the forms of RichHF-18K and Pick-a-Pic; 12 / 6 / 6 records."""
    return _write_raw(tmp_path)


@pytest.fixture(scope="session")
def joined(tmp_path_factory):
    """What `reward.richhf` makes of the raw data; for `data`, which hands out copies."""
    folder = _write_raw(tmp_path_factory.mktemp("raw"))
    flags = {"--tfrecords": "tfrecords", "--images": "images", "--out": "data"}
    richhf.main([str(word) for flag, name in flags.items() for word in (flag, folder / name)])
    return folder / "data"


@pytest.fixture
def data(joined, raw_data):
    """The joined data in the folder of the raw data, a copy that the test may change."""
    return Path(shutil.copytree(joined, raw_data / "data"))


@pytest.fixture
def command(data, model_folder, tmp_path):
    """The command line of a training of four steps on twelve pictures."""

    def make(output, **settings):
        settings = {
            "data": data,
            "model": model_folder,
            "output_dir": tmp_path / output,
            "max_steps": 4,
            "per_device_train_batch_size": 6,
            "logging_steps": 1,
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "eval_strategy": "steps",
            "save_strategy": "steps",
            "eval_steps": 2,
            "save_steps": 2,
            **settings,
        }
        return [part for name, value in settings.items() for part in (f"--{name}", str(value))]

    return make
