"""Input that is wrong, command by command: one line on stderr that says what, exit code 2, and nothing lost or left."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from PIL import Image
from transformers import AutoTokenizer, ViTConfig, ViTModel

from reward import evaluate, predict, richhf, train
from reward.arguments import main_guard
from reward.model import RahfModel
from reward.records import read_tfrecords
from tests.reward import by_hand


def png():
    """A picture's file, of some hundred bytes."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()


@pytest.fixture
def refused(capsys, tmp_path):
    """Run a command that must refuse its input; returns what it says of it."""

    def refused(main, *words):
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main_guard(main, [str(word) for word in words])
        said = capsys.readouterr().err.splitlines()
        assert caught.value.code == 2
        assert sum(line.startswith("error: ") for line in said) == 1
        assert said[-1].startswith("error: ")
        assert sorted(tmp_path.rglob("*")) == before
        return said[-1]

    return refused


@pytest.fixture
def build(raw_data):
    """The command line that joins the raw data."""
    flags = {"--tfrecords": "tfrecords", "--images": "images", "--out": "data"}
    return [str(word) for flag, name in flags.items() for word in (flag, raw_data / name)]


@pytest.fixture
def commands(tmp_path, data, model_folder):
    """The commands that read a data set and a checkpoint, both of which may be changed beforehand."""
    out, places = tmp_path / "out", ["--model", str(model_folder), "--data", str(data)]
    return {
        "evaluate": (evaluate.main, [*places, "--out", str(out), "--draws", "0", "--map_size", "32"]),
        "train": (train.main, [*places, "--output_dir", str(out), "--max_steps", "1", "--use_cpu", "true"]),
    }


def change(data, split, column, place, value):
    """Put `value` into a cell of the row `<split>-<place>` of a saved data set; nothing is decoded or checked."""
    whole = load_from_disk(str(data))
    rows = whole[split].with_format("arrow")[:].to_pylist()
    next(row for row in rows if row["uid"] == f"{split}-{place}")[column] = value
    whole[split] = Dataset.from_list(rows, features=whole[split].features)
    changed = data.with_name("changed")
    DatasetDict(whole).save_to_disk(str(changed))
    shutil.rmtree(data)
    changed.rename(data)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def judge(model_folder, tmp_path):
    """The command line that judges pictures, less the pictures and the prompts."""
    return ["--model", model_folder, "--out", tmp_path / "out"]


# Records and sources ------------------------------------------------------------------------------------------------


def test_a_folder_without_tfrecords(refused, build, raw_data):
    shutil.rmtree(raw_data / "tfrecords")
    (raw_data / "tfrecords").mkdir()
    (raw_data / "tfrecords" / "notes.txt").touch()
    assert "holds no TFRecords; RichHF-18K's are called train.tfrecord" in refused(richhf.main, *build)


@pytest.mark.parametrize("content", [b"no records, a page of HTML", b"", b"\0" * 100])
def test_a_corrupt_file_of_records(refused, build, raw_data, content):
    path = raw_data / "tfrecords" / "dev.tfrecord"
    path.write_bytes(content)
    said = refused(richhf.main, *build)
    assert str(path) in said
    assert "fetch it again" in said


def test_a_corrupt_source(refused, build, raw_data):
    path = raw_data / "images" / "1.parquet"
    path.write_bytes(path.read_bytes()[:200])
    assert "cannot be read" in refused(richhf.main, *build)


def test_a_source_without_the_columns(refused, build, raw_data):
    for path in (raw_data / "images").iterdir():
        path.unlink()
    table = pyarrow.table({"identity": ["a"], "picture": [b""]})
    pyarrow.parquet.write_table(table, raw_data / "images" / "0.parquet")
    said = refused(richhf.main, *build)
    assert "lacks the columns uid, image, prompt; it has identity, picture" in said


@pytest.mark.parametrize(
    ("change", "kind"),
    [(str.encode, "binary"), (lambda text: [text], "list<"), (len, "int64")],
    ids=["bytes", "list", "number"],
)
@pytest.mark.parametrize("source", ["pairs", "rows"])
def test_prompts_that_are_no_text(refused, build, raw_data, change, kind, source):
    files = sorted((raw_data / "images").iterdir())
    for path in files:
        rows = pyarrow.parquet.read_table(path).to_pylist()
        if source == "rows":
            rows = [{"uid": row["image_0_uid"], "image": row["jpg_0"], "prompt": row["caption"]} for row in rows]
        column = "prompt" if source == "rows" else "caption"
        if path == files[-1]:
            rows = [{**row, column: change(row[column])} for row in rows]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    said = refused(richhf.main, *build)
    assert f"{files[-1]}: the column '{column}' holds prompts and must be text, not {kind}" in said


@pytest.mark.parametrize(
    ("scores", "why"), [({"overall": 1.5}, "overall is 1.5"), ({"alignment": float("nan")}, "alignment is nan")]
)
def test_labels_out_of_range_cost_their_record_only(refused, build, raw_data, scores, why, capsys):
    path = raw_data / "tfrecords" / "train.tfrecord"
    first, *others = read_tfrecords(path)
    frames = [by_hand.frame(by_hand.example(first, scores=scores)), *map(by_hand.frame, map(by_hand.example, others))]
    path.write_bytes(b"".join(frames))
    assert f"1: labels out of range (train-0); {why}, not in [0, 1]" in refused(richhf.main, *build, "--strict")
    richhf.main(build)
    assert "train: 12 records read, 11 joined, 1 dropped" in capsys.readouterr().out


# A data set that was changed behind our back ------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["evaluate", "train"])
@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("overall", float("nan"), "overall is nan"),
        ("alignment", 1.5, "alignment is 1.5, not in [0, 1]"),
        ("plausibility", -0.1, "plausibility is -0.1"),
        ("keyword_labels", [0, 1, 2], "keyword_labels are [0, 1, 2]"),
        ("keyword_labels", [1], "1 keyword_labels for 3 tokens"),
    ],
)
def test_labels_that_cannot_be_meant(refused, commands, data, command, column, value, message):
    split = "test" if command == "evaluate" else "train"
    change(data, split, column, 3, value)
    main, words = commands[command]
    said = refused(main, *words)
    assert f"{data}, {split}: picture {split}-3: {message}" in said


@pytest.mark.parametrize("split", ["train", "dev"])
def test_a_split_that_lost_all_its_records(refused, build, commands, data, raw_data, split, caplog, monkeypatch):
    """It is told when the data are built, and a training does not begin with it: no model is read."""
    for path in (raw_data / "images").iterdir():
        rows = pyarrow.parquet.read_table(path).to_pylist()
        kept = [row for row in rows if not any(str(uid).startswith(split) for uid in row.values())]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(kept), path)
    shutil.rmtree(data)
    assert "--strict" in refused(richhf.main, *build, "--strict")
    richhf.main(build)
    assert f"split {split} is empty: none of its records could be joined" in caplog.text
    monkeypatch.setattr(train, "build_model", lambda arguments: pytest.fail("the model is read"))
    main, words = commands["train"]
    assert f"split '{split}' of {data} holds no picture" in refused(main, *words)


@pytest.mark.parametrize("command", ["evaluate", "train"])
def test_a_split_that_was_saved_without_a_row(refused, commands, data, command):
    whole = load_from_disk(str(data))
    DatasetDict({**whole, "dev": whole["dev"].select([])}).save_to_disk(str(data.with_name("less")))
    shutil.rmtree(data)
    data.with_name("less").rename(data)
    main, words = commands[command]
    assert f"{data} has a split without a picture" in refused(main, *words)


@pytest.mark.parametrize("column", ["image", "misalignment_map"])
@pytest.mark.parametrize("value", [{"bytes": b"no picture", "path": None}, {"bytes": PNG[:60], "path": None}, None])
@pytest.mark.parametrize("command", ["evaluate", "train"])
def test_pictures_that_do_not_decode(refused, commands, data, command, column, value):
    split = "test" if command == "evaluate" else "train"
    change(data, split, column, 3, value)
    main, words = commands[command]
    words = [*words, "--in_memory", "true"] if command == "train" else words
    said = refused(main, *words)
    assert f"the {column} of {split}-3 {'is missing' if value is None else 'cannot be decoded'}" in said


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_picture_met_in_the_middle_of_a_training(commands, data, capsys, workers):
    """Without `in_memory` it is met when its turn comes, by a worker if there are any: one line, no traceback."""
    change(data, "train", "image", 3, {"bytes": b"no picture", "path": None})
    main, words = commands["train"]
    more = ["--max_steps", "12", "--per_device_train_batch_size", "1", "--dataloader_num_workers", workers]
    more += ["--disable_tqdm", "true"]
    with pytest.raises(SystemExit) as ended:
        main_guard(main, [*words, *more])
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert said[-1].startswith("error: the image of train-3 cannot be decoded")
    assert not any("Traceback" in line for line in said)


def test_an_empty_prompt_among_the_data_is_no_error(commands, data, tmp_path):
    """`reward.richhf` leaves such rows out; where they come from elsewhere, only their words do not count."""
    for split in ("train", "dev", "test"):
        for column in ("tokens", "keyword_labels"):
            change(data, split, column, 3, [])
    for command, kept in (("train", "model.safetensors"), ("evaluate", "tables.md")):
        main, words = commands[command]
        main([word.replace(str(tmp_path / "out"), str(tmp_path / command)) for word in words])
        assert (tmp_path / command / kept).is_file()


def test_raters_scores_out_of_range(refused, commands, data):
    shutil.copytree(data, data.with_name("raters"))
    change(data.with_name("raters"), "test", "overall", 2, 7.0)
    main, words = commands["evaluate"]
    raters = data.with_name("raters")
    said = refused(main, *words, "--raters", raters)
    assert f"the raters' folder {raters}: picture test-2: overall is 7, not in [0, 1]" in said


@pytest.mark.parametrize("command", ["evaluate", "train"])
def test_data_without_a_column(refused, commands, data, command):
    whole = load_from_disk(str(data))
    whole = DatasetDict({name: rows.remove_columns("tokens") for name, rows in whole.items()})
    whole.save_to_disk(str(data.with_name("less")))
    shutil.rmtree(data)
    data.with_name("less").rename(data)
    main, words = commands[command]
    assert "lack the columns ['tokens']" in refused(main, *words)


# Checkpoints --------------------------------------------------------------------------------------------------------


def other_class(folder):
    ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)).save_pretrained(
        folder
    )


def no_json(folder):
    (folder / "config.json").write_text('{"model_type": "ra')


def a_list(folder):
    (folder / "config.json").write_text("[]")


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def torn_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def other_width(folder):
    config = json.loads((folder / "config.json").read_text())
    config["head_width"] = 0.5
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("command", ["evaluate", "predict", "train"])
@pytest.mark.parametrize("spoil", [other_class, no_json, a_list])
def test_a_checkpoint_of_something_else(refused, commands, judge, picture, model_folder, command, spoil):
    spoil(model_folder)
    lines = {**commands, "predict": (predict.main, [*judge, "--images", picture, "--prompts", "red"])}
    main, words = lines[command]
    assert f"{model_folder} is not a RAHF checkpoint" in refused(main, *words)


@pytest.mark.parametrize("spoil", [no_weights, torn_weights, other_width])
def test_a_checkpoint_that_is_damaged(refused, judge, picture, model_folder, spoil):
    spoil(model_folder)
    assert str(model_folder) in refused(predict.main, *judge, "--images", picture, "--prompts", "red")


def test_a_checkpoint_without_one_of_its_files(refused, judge, picture, model, model_folder):
    no_weights(model_folder)
    model.save_pretrained(model_folder, max_shard_size="60KB")
    files = sorted(model_folder.glob("*.safetensors"))
    files[1].unlink()
    said = refused(predict.main, *judge, "--images", picture, "--prompts", "red")
    assert f"{model_folder} lacks {files[1].name} (1 of {len(files)} files of weights are missing)" in said
    (model_folder / "model.safetensors.index.json").write_text("{}")
    said = refused(predict.main, *judge, "--images", picture, "--prompts", "red")
    assert "model.safetensors.index.json is no list of a checkpoint's files" in said


@pytest.mark.parametrize("empty", [False, True])
def test_backbones_that_are_not_there(refused, commands, tmp_path, empty):
    if empty:
        (tmp_path / "nowhere").mkdir()
    main, words = commands["train"]
    words = words[2:]  # without --model
    said = refused(main, *words, "--vision_model", tmp_path / "nowhere", "--text_model", "nowhere")
    assert f"--vision_model {tmp_path}/nowhere or --text_model nowhere cannot be loaded" in said


def test_a_backbone_of_another_kind(refused, commands, tmp_path):
    """A vision model where text is wanted."""
    ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4).save_pretrained(
        tmp_path
    )
    main, words = commands["train"]
    said = refused(main, *words[2:], "--vision_model", tmp_path, "--text_model", tmp_path)
    assert "the text model is a 'vit'; RAHF is built on one of t5" in said


# Places for results --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("command", ["evaluate", "predict", "train"])
def test_a_file_where_the_results_folder_is_to_be(
    refused, commands, judge, picture, tmp_path, command, inside, monkeypatch
):
    """Told before the model, which is the first thing that takes long, is read."""
    for owner in (RahfModel, AutoTokenizer):
        monkeypatch.setattr(owner, "from_pretrained", lambda *args, **kwargs: pytest.fail("the model is read"))
    (tmp_path / "file").write_text("mine")
    place = tmp_path / "file" / "out" if inside else tmp_path / "file"
    lines = {**commands, "predict": (predict.main, [*judge, "--images", picture, "--prompts", "red"])}
    main, words = lines[command]
    said = refused(main, *[place if str(word) == str(tmp_path / "out") else word for word in words])
    assert (f"cannot be made: {tmp_path}/file is a file" if inside else f"{place} is a file; name a folder") in said
    assert (tmp_path / "file").read_text() == "mine"


@pytest.fixture
def makers(build, judge, picture):
    """The commands that make a folder which is there at once, when it is whole."""
    asked = [*judge, "--images", picture, "--prompts", "red"]
    return {"richhf": (richhf.main, build), "predict": (predict.main, asked)}


@pytest.mark.parametrize("command", ["richhf", "predict"])
@pytest.mark.parametrize("there", [False, True], ids=["dangling", "empty"])
def test_a_link_is_followed_to_where_the_results_are_to_be(makers, tmp_path, command, there):
    (tmp_path / "disk").mkdir()
    place, link = tmp_path / "disk" / "here", tmp_path / "link"
    if there:
        place.mkdir()
    link.symlink_to(place)
    main, words = makers[command]
    words = [str(word) for word in words]
    words[words.index("--out") + 1] = str(link)
    main(words)
    assert link.is_symlink()
    assert len(list(place.iterdir())) > 3


@pytest.mark.parametrize("command", ["richhf", "predict"])
def test_a_folder_that_cannot_be_replaced(refused, makers, tmp_path, command, monkeypatch):
    """Said before the work, which would be lost."""
    (tmp_path / "here").mkdir()
    main, words = makers[command]
    words = [str(word) for word in words]
    words[words.index("--out") + 1] = str(tmp_path / "here")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "is_mount", lambda path: path.name == "here")
        assert f"--out {tmp_path}/here is a mount point, which cannot be replaced" in refused(main, *words)
    monkeypatch.chdir(tmp_path / "here")
    words[words.index("--out") + 1] = "."
    assert "--out . is the folder you are in, which cannot be replaced; name a folder in it" in refused(main, *words)


def test_a_folder_where_a_report_is_to_be(refused, commands, tmp_path):
    main, words = commands["evaluate"]
    assert f"--json {tmp_path} is a folder; name a file" in refused(main, *words, "--json", tmp_path)


# Pictures and prompts -----------------------------------------------------------------------------------------------


def saved(image, path, **options):
    image.save(path, **options)
    return path


def test_pictures_of_every_kind_are_judged(judge, tmp_path):
    """One pixel, transparent, CMYK, 16 bit, grey and a palette: what they show, in 8-bit RGB."""
    (tmp_path / "kinds").mkdir()
    wide = np.linspace(0, 65535, 600).reshape(20, 30).astype(np.uint16)
    images = [
        saved(Image.new("RGB", (1, 1), "red"), tmp_path / "kinds" / "one.png"),
        saved(Image.new("RGBA", (20, 30), (255, 0, 0, 0)), tmp_path / "kinds" / "clear.png"),
        saved(Image.new("RGB", (20, 30), "white"), tmp_path / "kinds" / "white.png"),
        saved(Image.new("CMYK", (20, 30), (0, 255, 255, 0)), tmp_path / "kinds" / "print.jpg"),
        saved(Image.fromarray(wide), tmp_path / "kinds" / "wide.png"),
        saved(Image.fromarray(np.round(wide / 257).astype(np.uint8)), tmp_path / "kinds" / "grey.png"),
        saved(Image.new("P", (20, 30)), tmp_path / "kinds" / "palette.gif"),
    ]
    predict.main([*map(str, judge), "--images", *map(str, images), "--prompts", *["red"] * len(images)])
    lines = [json.loads(line) for line in (tmp_path / "out" / "feedback.jsonl").read_text().splitlines()]
    said = {path.stem: line["scores"] for path, line in zip(images, lines, strict=True)}
    assert said["clear"] == pytest.approx(said["white"], abs=1e-6)
    assert said["wide"] == pytest.approx(said["grey"], abs=1e-6)
    with Image.open(tmp_path / "out" / lines[0]["implausibility_map"]) as heatmap:
        assert heatmap.size == (1, 1)


def test_strips_of_a_pixels_width_are_judged(judge, picture, tmp_path):
    """Their overlays stay drawable, and of a size that fits a screen."""
    tall = saved(Image.new("RGB", (1, 1000), "red"), tmp_path / "tall.png")
    wide = saved(Image.new("RGB", (3000, 1), "red"), tmp_path / "wide.png")
    words = [*judge, "--images", picture, tall, wide, "--prompts", "red", "red", "red"]
    predict.main([str(word) for word in words])
    overlays = list((tmp_path / "out").glob("*_overlay.png"))
    assert len(overlays) == 3
    for path in overlays:
        with Image.open(path) as overlay:
            assert 60 < overlay.width < 4000


def test_a_model_that_has_diverged(refused, judge, picture, model, model_folder):
    with torch.no_grad():
        model.project.bias.fill_(float("nan"))
    model.save_pretrained(model_folder)
    said = refused(predict.main, *judge, "--images", picture, "--prompts", "red")
    assert f"the model's feedback of {picture} is NaN or infinite" in said


@pytest.mark.parametrize(
    ("device", "message"), [("gpu", "is 'gpu'; write cpu"), ("cuda:99", "cuda:99, but torch sees")]
)
def test_a_device_that_is_not_there(refused, judge, picture, device, message):
    assert message in refused(predict.main, *judge, "--images", picture, "--prompts", "red", "--device", device)


def test_a_picture_whose_name_is_a_whole_prompt(judge, picture, tmp_path):
    long = tmp_path / ("a red circle left of a blue square, " * 6 + "ü" * 15 + ".png")
    long.write_bytes(Path(picture).read_bytes())
    predict.main([str(word) for word in [*judge, "--images", long, "--prompts", "red"]])
    line = json.loads((tmp_path / "out" / "feedback.jsonl").read_text())
    assert line["image"] == str(long)
    assert line["overlay"].startswith("0000_a red circle left of")
    assert all((tmp_path / "out" / line[name]).is_file() for name in ("overlay", "implausibility_map"))


def test_an_empty_prompt_is_judged_without_words(judge, picture, tmp_path, caplog):
    words = [*judge, "--images", picture, picture, picture, "--prompts", "red", "", " ,. "]
    predict.main([str(word) for word in words])
    assert "prompts without a word: 2 of 3, first the one of picture 2" in caplog.text
    lines = (tmp_path / "out" / "feedback.jsonl").read_text().splitlines()
    assert len(lines) == 3
    for line in lines[1:]:
        found = json.loads(line)
        assert (found["tokens"], found["struck_out"]) == ([], [])
        assert all(0 <= value <= 1 for value in found["scores"].values())


@pytest.mark.parametrize("content", [None, b"", b"no picture", b"\x89PNG\r\n\x1a\n"])
def test_a_picture_that_does_not_decode(refused, judge, picture, tmp_path, content):
    wrong = tmp_path / "wrong.png"
    if content is not None:
        wrong.write_bytes(content)
    said = refused(predict.main, *judge, "--images", picture, wrong, "--prompts", "red", "red", "--batch_size", "1")
    assert str(wrong) in said
    said = refused(predict.main, *judge, "--images", wrong, picture, wrong, "--prompts", *["red"] * 3)
    assert "2 of 3 are wrong" in said
