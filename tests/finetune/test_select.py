"""The real command, on a tiny pipeline and a tiny predictor."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from finetune import files, generate, predictions, select
from finetune.pool import read_pictures
from reward.arguments import main_guard
from reward.model import RahfModel
from reward.predict import RichFeedbackPredictor
from reward.whole_files import write_whole
from tests.rl.conftest import full_disk

ROOT = Path(__file__).parents[2]


def command(*argv):
    """Exit code of `python -m finetune.select argv`, in this process."""
    with pytest.raises(SystemExit) as caught:
        main_guard(select.main, [str(part) for part in argv])
    return caught.value.code


def flags(**settings):
    settings["rules"] = json.dumps(settings["rules"])
    return [part for name, value in settings.items() for part in (f"--{name}", value)]


@pytest.fixture
def given(write_pictures, model_folder, tmp_path):
    """Settings of a selection from a folder."""
    return {
        "pictures": write_pictures(tmp_path / "pictures"), "model": model_folder, "output_dir": tmp_path / "chosen",
        "rules": {"some": {"random": 3}}, "use_cpu": True,
    }  # fmt: skip


@pytest.fixture
def drawn(pipeline_folder, model_folder, prompt_file, tmp_path):
    """Settings of a selection from pictures that are drawn: 6 of them, in batches of 4."""
    return {
        "pictures": tmp_path / "pool", "policy": pipeline_folder, "prompts": prompt_file, "model": model_folder,
        "num_generations": 2, "num_inference_steps": 2, "generation_batch_size": 4, "use_cpu": True,
        "output_dir": tmp_path / "chosen", "rules": {"best": {"best_of": "overall"}},
    }  # fmt: skip


def test_from_prompts_to_an_image_folder(drawn, tmp_path, capsys):
    assert command(*flags(**drawn)) == 0
    said = capsys.readouterr().out
    for phrase in ("drawing 6 pictures", "predicting", "best of each prompt", "3 of 6 pictures kept"):
        assert phrase in said
    chosen = tmp_path / "chosen"
    report = json.loads((chosen / "selection.json").read_text())
    assert report["rules"] == [
        {"name": "best", "rule": "the best of each prompt by overall", "of": 6, "kept": 3},
    ]
    assert report["means"]["overall"]["kept"] > report["means"]["overall"]["all"]
    for name in ("histograms.png", "kept.png", "rejected.png"):
        assert (chosen / name).stat().st_size > 1000, name
    # As diffusers' train_text_to_image scripts read it.
    loaded = datasets.load_dataset(
        "imagefolder", data_files={"train": str(chosen / "data" / "**")}, cache_dir=str(tmp_path / "cache")
    )["train"]
    assert {"image", "text", "overall"} <= set(loaded.column_names)
    assert sorted(loaded["text"][:]) == ["a blue square", "a red circle", "a red square"]
    assert loaded[0]["image"].size == (16, 16)


def test_another_rule_needs_no_new_prediction(given, monkeypatch):
    assert command(*flags(**given)) == 0
    monkeypatch.setattr(RichFeedbackPredictor, "from_pretrained", lambda *arguments: pytest.fail("predicts again"))
    given |= {"rules": {"more": {"random": 5}}, "overwrite_output_dir": True}
    assert command(*flags(**given)) == 0
    report = json.loads((given["output_dir"] / "selection.json").read_text())
    assert (report["kept"], report["pictures"]) == (5, 6)


def test_predictions_are_the_predictors_own(given, predictor):
    assert command(*flags(**given)) == 0
    pool = select.open_pool(given["pictures"])
    stored = predictions.Store(pool, given["model"]).load()
    for place in (0, 1):  # of two sizes
        (image,) = read_pictures(pool, [place])
        feedback = predictor(image[None].float() / 255, [pool.entries[place].prompt], heatmap_size=16)
        features = predictor.features(image[None].float() / 255)[0]
        assert stored.values["overall"][place] == pytest.approx(float(feedback.scores["overall"][0]), abs=1e-5)
        assert stored.misaligned[place].tolist() == pytest.approx(feedback.misaligned[0].tolist(), abs=1e-5)
        assert stored.features[place].tolist() == pytest.approx(features.tolist(), abs=2e-3)
        mean = float(feedback.heatmaps["implausibility"][0].mean())
        assert stored.values["implausibility"][place] == pytest.approx(mean, abs=2e-3)
        assert stored.maps["implausibility"][place].mean() / 255 == pytest.approx(mean, abs=4e-3)


def test_few_pictures_are_in_memory_at_once(given, predictor, monkeypatch):
    """Six pictures of a part, two at a time; the feedback is the same in its order."""
    pool, read = select.open_pool(given["pictures"]), []
    monkeypatch.setattr(
        predictions, "read_pictures", lambda pool, some: read.append(list(some)) or read_pictures(pool, some)
    )
    predictions.Store(pool, given["model"]).predict([range(6)], predictor, batch_size=2)
    whole = predictions.Store(pool, given["model"]).load()
    assert read.pop() == [0, 1, 2, 3, 4, 5]
    monkeypatch.setattr(predictions, "AT_ONCE", 2)
    predictions.Store(pool, given["model"]).predict([range(6)], predictor, batch_size=2)
    assert read == [[0, 1], [2, 3], [4, 5]]
    apart = predictions.Store(pool, given["model"]).load()
    assert apart.names == whole.names
    for name, values in whole.values.items():
        assert apart.values[name] == pytest.approx(values, abs=1e-5)


def test_only_what_changed_is_predicted_anew(given, monkeypatch):
    monkeypatch.setattr(predictions, "PART", 2)
    assert command(*flags(**given)) == 0
    (given["pictures"] / "3.png").write_bytes((given["pictures"] / "1.png").read_bytes())
    store = predictions.Store(select.open_pool(given["pictures"]), given["model"])
    assert store.missing() == [[3]]
    config = given["model"] / "config.json"
    config.write_text(config.read_text() + "\n")
    another = predictions.Store(store.pool, given["model"])  # another predictor's are kept apart
    assert another.missing() == [[0, 1], [2, 3], [4, 5]]
    assert another.missing(1, 2) == [[2, 3]]


def lines_of(folder):
    return (folder / "metadata.jsonl").read_text().splitlines()


def take_away(folder, *numbers):
    lines = [line for number, line in enumerate(lines_of(folder)) if number not in numbers]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    for number in numbers:
        (folder / f"{number}.png").unlink()


def test_what_is_known_of_a_picture_is_found_wherever_it_stands(given, predictor, monkeypatch):
    """Behind one that is taken away, behind one that is put before it, and in another order."""
    monkeypatch.setattr(predictions, "PART", 2)
    assert command(*flags(**given)) == 0
    whole = predictions.Store(select.open_pool(given["pictures"]), given["model"]).load()
    folder = given["pictures"]
    take_away(folder, 1)
    lines = lines_of(folder)
    (folder / "new.png").write_bytes((folder / "0.png").read_bytes())
    new = json.dumps({"file_name": "new.png", "text": "a red circle"})
    (folder / "metadata.jsonl").write_text("\n".join([new, *reversed(lines)]))
    store = predictions.Store(select.open_pool(folder), given["model"])
    assert store.missing() == [[0]]
    assert store.missing(1, 2) == []
    store.predict([[0]], predictor, batch_size=2)
    found = store.load()
    assert found.names == ["new.png", "5.png", "4.png", "3.png", "2.png", "0.png"]
    before = [5, 4, 3, 2, 0]  # where the last five stood
    assert found.prompts[1:] == [whole.prompts[place] for place in before]
    assert found.tokens[1:] == [whole.tokens[place] for place in before]
    assert np.array_equal(found.features[1:], whole.features[before])
    for name, values in whole.values.items():
        assert np.array_equal(found.values[name][1:], values[before]), name
    for name, maps in whole.maps.items():
        assert np.array_equal(found.maps[name][1:], maps[before]), name
    assert [row.tolist() for row in found.misaligned[1:]] == [whole.misaligned[place].tolist() for place in before]


def test_two_pools_may_keep_their_predictions_in_one_folder(given, write_pictures, tmp_path, monkeypatch):
    given |= {"feedback_dir": tmp_path / "feedback"}
    other = write_pictures(tmp_path / "other", sizes=((16, 16), (24, 16)))
    assert command(*flags(**given)) == 0
    assert command(*flags(**given | {"pictures": other, "output_dir": tmp_path / "second"})) == 0
    monkeypatch.setattr(RichFeedbackPredictor, "from_pretrained", lambda *arguments: pytest.fail("predicts again"))
    assert command(*flags(**given | {"overwrite_output_dir": True})) == 0


def test_splits_of_a_data_set_keep_their_predictions_beside_each_other(given, tmp_path, monkeypatch):
    pool = select.open_pool(given["pictures"])
    rows = [{"image": {"bytes": pool.read(place), "path": None}, "text": "a red circle"} for place in range(6)]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    for split, some in (("train", rows[:2]), ("test", rows[2:])):
        datasets.Dataset.from_list(some, features=features).to_parquet(str(tmp_path / "data" / f"{split}.parquet"))
    given |= {"pictures": tmp_path / "data", "rules": {}, "overwrite_output_dir": True}
    assert command(*flags(**given)) == 0
    assert command(*flags(**given, split="test")) == 0
    monkeypatch.setattr(RichFeedbackPredictor, "from_pretrained", lambda *arguments: pytest.fail("predicts again"))
    assert command(*flags(**given)) == 0
    assert len(lines_of(given["output_dir"] / "data")) == 2


def test_what_processes_predict_together_is_what_one_predicts(given, predictor, tmp_path, monkeypatch):
    """Each asks for its own while another has begun to write."""
    monkeypatch.setattr(predictions, "PART", 2)
    pool = select.open_pool(given["pictures"])
    one, two = (predictions.Store(pool, given["model"], tmp_path / name) for name in ("one", "two"))
    one.predict(one.missing(), predictor, batch_size=2)
    for rank in (1, 0):
        two.predict(two.missing(rank, 2), predictor, batch_size=2)
    assert files_of(two.folder) == files_of(one.folder)
    assert len(files_of(one.folder)) == 3


def test_no_rules_keep_everything_and_the_pools_own_columns_come_along(given, write_pictures, tmp_path, caplog):
    rows = {
        "uid": list("abcdef"), "rating": [1.0, 2.0, float("nan"), 4.0, 5.0, 6.0], "overall": [0] * 6,
        "mask_file_name": ["m.png"] * 6, "notes": [[float("nan")]] * 6,
    }  # fmt: skip
    pictures = write_pictures(tmp_path / "rated", **rows)
    assert command(*flags(**given | {"pictures": pictures, "rules": {}})) == 0
    lines = [json.loads(line) for line in lines_of(given["output_dir"] / "data")]
    assert [line["uid"] for line in lines] == list("abcdef")
    assert [line["rating"] for line in lines] == [1.0, 2.0, None, 4.0, 5.0, 6.0]
    assert all(0 < line["overall"] < 1 for line in lines)  # the predictor's
    assert not any({"mask_file_name", "notes"} & line.keys() for line in lines)
    for name, why in (
        ("overall", "the selection has a column of that name; rename yours"),
        ("mask_file_name", "`datasets` would look for these files"),
        ("notes", "JSON cannot hold it"),
    ):
        assert f"the column {name} of {pictures} is left out of the selection: {why}" in caplog.text
    report = json.loads((given["output_dir"] / "selection.json").read_text())
    assert report["rules"] == [{"name": "all", "rule": "every picture", "of": 6, "kept": 6}]
    loaded = datasets.load_dataset(
        "imagefolder", data_files={"train": str(given["output_dir"] / "data" / "**")}, cache_dir=str(tmp_path / "cache")
    )["train"]
    assert loaded["rating"][:2] == [1.0, 2.0]


def test_a_damaged_part_is_predicted_again(given, caplog):
    assert command(*flags(**given)) == 0
    (part,) = Path(f"{given['pictures']}_feedback").rglob("*.parquet")
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    assert command(*flags(**given, overwrite_output_dir=True)) == 0
    assert f"{part} is damaged; what it held is predicted again" in caplog.text
    assert part.read_bytes() == whole


def test_pictures_whose_names_would_become_one_are_kept_apart(given):
    for number in range(3, 6):
        (given["pictures"] / f"{number}.png").unlink()
    lines = [{"file_name": name, "text": "a red circle"} for name in ("a", "a.png", "b.png")]
    for line, number in zip(lines, range(3), strict=True):
        (given["pictures"] / f"{number}.png").rename(given["pictures"] / line["file_name"])
    (given["pictures"] / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert command(*flags(**given)) == 0
    data = given["output_dir"] / "data"
    names = [json.loads(line)["file_name"] for line in (data / "metadata.jsonl").read_text().splitlines()]
    assert sorted(names) == ["a-2.png", "a.png", "b.png"]
    chosen = {(data / name).read_bytes() for name in names}
    assert chosen == {(given["pictures"] / line["file_name"]).read_bytes() for line in lines}
    assert len(select.open_pool(data).entries) == 3


def test_a_folder_with_a_table_has_no_splits(given, caplog):
    assert command(*flags(**given, split="test")) == 0
    assert f"split test is ignored: {given['pictures']} is a folder of pictures with a table" in caplog.text


def test_a_resolution_that_does_not_fit_claims_no_folder(drawn, capsys):
    assert command(*flags(**drawn, resolution=0)) == 2
    assert "resolution is 0; it is in pixels" in capsys.readouterr().err
    assert command(*flags(**drawn, resolution=102)) == 2
    assert "resolution is 102; this pipeline needs a multiple of" in capsys.readouterr().err
    assert command(*flags(**drawn)) == 0


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_interrupted_drawing_goes_on_to_the_same_bits_and_so_do_many_processes(drawn, tmp_path, monkeypatch):
    settings = generate.GenerationArguments(
        **{name: drawn[name] for name in ("policy", "num_generations", "num_inference_steps")},
        prompts=str(drawn["prompts"]), generation_batch_size=4,
    )  # fmt: skip
    prompts = ["a red circle", "a blue square", "a red square", "two green star", "a red circle"]  # one twice
    policy = settings.load()

    def draw(folder, ranks, order=None):
        pool = generate.Generation(tmp_path / folder, settings, prompts)
        pool.claim()
        for rank in order or range(ranks):
            pool.draw(pool.missing(rank, ranks), policy)
        pool.finish()
        return pool

    draw("one", 1)
    draw("three", 3, order=[2, 0, 1])
    written, write = [], generate.write_whole

    def stop_at_the_sixth(file, data):
        if len(written) == 6:
            raise KeyboardInterrupt
        written.append(file)
        write(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(generate, "write_whole", stop_at_the_sixth)
        with pytest.raises(KeyboardInterrupt):
            draw("stopped", 1)
    assert not (tmp_path / "stopped" / "metadata.jsonl").exists()
    resumed = generate.Generation(tmp_path / "stopped", settings, prompts)
    assert resumed.missing() == [range(4, 8), range(8, 10)]  # the table of settings and pictures 0-4 are there
    draw("stopped", 1)
    whole = files_of(tmp_path / "one")
    assert len(whole) == 12
    assert files_of(tmp_path / "three") == whole
    assert files_of(tmp_path / "stopped") == whole
    assert whole["000000_00.png"] != whole["000004_00.png"]  # the same prompt, other noise


def test_two_processes_of_the_command_leave_what_one_leaves(drawn, tmp_path):
    assert command(*flags(**drawn)) == 0
    two = drawn | {"pictures": tmp_path / "two_pool", "output_dir": tmp_path / "two"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launcher, "-m", "finetune.select", *map(str, flags(**two))],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert files_of(two["pictures"]) == files_of(drawn["pictures"])
    one, other = (sorted((folder / "data").rglob("*.png")) for folder in (drawn["output_dir"], two["output_dir"]))
    assert [file.name for file in one] == [file.name for file in other]
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in other]
    assert len(one) > 0


def test_a_pool_of_other_settings_is_left_alone(drawn, capsys):
    assert command(*flags(**drawn)) == 0
    before = files_of(drawn["pictures"])
    drawn |= {"overwrite_output_dir": True}
    assert command(*flags(**drawn, seed=5)) == 2
    assert "drawn with other settings (seed: 0 -> 5)" in capsys.readouterr().err
    assert files_of(drawn["pictures"]) == before
    assert command(*flags(**{**drawn, "pictures": drawn["model"]})) == 2
    assert "holds other files, and `policy` would draw into it" in capsys.readouterr().err


def test_an_unreadable_picture_is_named_and_nothing_is_lost(given, monkeypatch, capsys):
    monkeypatch.setattr(predictions, "PART", 2)
    broken = given["pictures"] / "2.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:60])
    assert command(*flags(**given)) == 2
    assert "the picture 2.png of" in (error := capsys.readouterr().err)
    assert "what has been done is kept" in error
    assert not given["output_dir"].exists()
    store = predictions.Store(select.open_pool(given["pictures"]), given["model"])
    assert store.missing() == [[2, 3], [4, 5]]
    broken.write_bytes(whole)
    assert command(*flags(**given)) == 0


def test_feedback_that_is_nan_is_never_kept(given, model_folder, monkeypatch, capsys):
    """Of such a picture no word would count as misaligned, and every rule on words would keep it."""
    from reward.predict import RichFeedbackPredictor

    ask = RichFeedbackPredictor.with_features

    def diverged(self, *question):
        feedback, features = ask(self, *question)
        feedback.misaligned[0][:] = float("nan")
        return feedback, features

    monkeypatch.setattr(RichFeedbackPredictor, "with_features", diverged)
    assert command(*flags(**given)) == 2
    assert "the model's feedback of 0.png is NaN or infinite" in capsys.readouterr().err
    assert not list((given["pictures"].with_name("pictures_feedback")).rglob("*.parquet"))


def test_what_is_written_is_what_was_judged(given):
    """A transparent pixel is judged on white; a trainer that drops the alpha channel would see what is under it."""
    hidden = np.zeros((16, 16, 4), dtype=np.uint8)
    hidden[..., 0] = 200
    Image.fromarray(hidden).save(given["pictures"] / "0.png")
    plain = (given["pictures"] / "1.png").read_bytes()
    assert command(*flags(**given | {"rules": {"all": {"score": "overall", "at_least": 0.0}}})) == 0
    data = given["output_dir"] / "data"
    assert np.array_equal(np.asarray(Image.open(data / "0.png")), np.full((16, 16, 3), 255))
    assert (data / "1.png").read_bytes() == plain


def test_an_empty_selection_keeps_the_last_one(given, capsys):
    assert command(*flags(**given)) == 0
    before = (given["output_dir"] / "selection.json").read_bytes()
    given |= {"rules": {"strict": {"score": "overall", "at_least": 2}}, "overwrite_output_dir": True}
    assert command(*flags(**given)) == 2
    assert "no picture is left: the rule `strict` (overall at least 2) removed the last 6" in capsys.readouterr().err
    assert (given["output_dir"] / "selection.json").read_bytes() == before


def test_other_mistakes(given, drawn, capsys, tmp_path):
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux" / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    for settings, message in (
        (given | {"rules": {"r": {"score": "overal", "at_least": 1}}}, "nearest name: `overall`"),
        (given | {"colour": 1}, "unknown setting on the command line: `--colour`"),
        (given | {"pictures": tmp_path / "none"}, "there is no folder of pictures"),
        (given | {"model": tmp_path / "none"}, "there is no model folder"),
        (given | {"output_dir": tmp_path / "full"}, "holds other files; give another --output_dir"),
        (given | {"num_examples": 0}, "num_examples is 0; it must be at least 1"),
        (drawn | {"policy": tmp_path / "flux"}, "is a FluxPipeline; what works here is StableDiffusionPipeline"),
        (drawn | {"num_generations": 0}, "num_generations is 0"),
        (drawn | {"prompts": tmp_path / "none.txt"}, "cannot read the prompt file"),
        (drawn | {"num_inference_steps": 2000}, "it must lie between 1 and 1000"),
    ):
        assert command(*flags(**settings)) == 2
        assert message in capsys.readouterr().err
    assert not drawn["pictures"].exists()
    assert command(*flags(**given)) == 0
    assert command(*flags(**given)) == 2
    assert "holds a selection; give another --output_dir, or --overwrite_output_dir true" in capsys.readouterr().err


def test_settings_of_drawing_are_ignored_where_nothing_is_drawn(given, caplog):
    assert command(*flags(**given, seed=3)) == 0
    assert "seed=3 is ignored: there is no policy" in caplog.text


@pytest.mark.parametrize("name", ["tinyworld", "sd15", "sdxl"])
def test_presets_are_valid(name):
    path = str(ROOT / f"configs/select_{name}.yaml")
    lines = Path(path).read_text().splitlines()
    assert all(line.startswith("# ") for line in lines[:3])
    assert f"--config configs/select_{name}.yaml" in lines[0]
    arguments, generation = select.parse_arguments(
        [select.SelectArguments, generate.GenerationArguments], ["--config", path]
    )
    assert generation.num_generations == 8
    assert len(select.read_rules(arguments.rules)) == len(yaml.safe_load(Path(path).read_text())["rules"])


def test_a_full_disk_is_named_and_leaves_nothing_half_written(tmp_path):
    write_whole(tmp_path / "a", b"before")
    with full_disk(), pytest.raises(OSError, match=r"cannot write .*a: File too large; what was written before"):
        write_whole(tmp_path / "a", b"x" * 10_000)
    assert files_of(tmp_path) == {"a": b"before"}


def test_parts_are_replaced_all_or_none_and_what_else_is_there_stays(tmp_path, monkeypatch):
    folder, parts = tmp_path / "folder", ("report", "data", "chart")

    def write(content, *names, fail=False):
        with files.replaced_parts(folder, parts) as new:
            for name in names:
                (new / name).write_text(content)
            if fail:
                raise KeyboardInterrupt

    write("one", "report", "data", "chart")
    (folder / "mine").write_text("mine")
    before = files_of(folder)
    with pytest.raises(KeyboardInterrupt):
        write("two", "report", "data", fail=True)
    assert files_of(folder) == before
    replace = os.replace
    for failing in range(5):  # three parts go, two come
        left = [failing]

        def fails_once(source, target, left=left):
            left[0] -= 1
            if left[0] == -1:
                raise OSError("no room")
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "replace", fails_once)
            with pytest.raises(OSError, match="no room"):
                write("two", "report", "data")
        assert files_of(folder) == before
    write("two", "report", "data")
    assert files_of(folder) == {"report": b"two", "data": b"two", "mine": b"mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_folder_that_is_a_disk_of_its_own_is_written_on_that_disk(tmp_path):
    """And what a killed process left on it is no obstacle, and goes with the next one."""
    folder = tmp_path / "disk"
    (folder / "lost+found").mkdir(parents=True)
    (folder / ".disk.killed" / "new").mkdir(parents=True)
    (folder / ".pool.json.7.part").touch()
    assert not files.holds_files(folder)
    with files.replaced_parts(folder, ("data",)) as new:
        assert new.is_relative_to(folder)
        (new / "data").write_text("whole")
    assert files.holds_files(folder)
    assert (folder / "data").read_text() == "whole"
    assert not (folder / ".disk.killed" / "new").exists()


def test_pictures_and_selection_in_one_another_are_refused_and_nothing_is_lost(given, drawn, tmp_path, capsys):
    around = tmp_path / "pictures"
    for settings in (
        drawn | {"pictures": tmp_path / "chosen" / "pool"},
        drawn | {"pictures": tmp_path / "chosen"},
        drawn | {"feedback_dir": tmp_path / "chosen" / "feedback"},
        given | {"output_dir": tmp_path / "pictures_feedback"},
        given | {"output_dir": around / "chosen"},
        given | {"output_dir": around / ".." / "pictures", "overwrite_output_dir": True},
    ):
        assert command(*flags(**settings)) == 2
        assert "lies in or around the pictures" in capsys.readouterr().err
    assert len(files_of(around)) == 7
    assert not any((tmp_path / name).exists() for name in ("chosen", "pool", "pictures_feedback"))


def test_overwriting_a_selection_leaves_what_else_is_in_its_folder(given):
    assert command(*flags(**given)) == 0
    lora = given["output_dir"] / "sft_run" / "lora.safetensors"
    lora.parent.mkdir()
    lora.write_text("hours of training")
    given |= {"rules": {"all": {"random": 6}}, "overwrite_output_dir": True}
    assert command(*flags(**given)) == 0
    assert lora.read_text() == "hours of training"
    names = {path.name for path in given["output_dir"].iterdir()}
    assert names == {"data", "selection.json", "kept.png", "sft_run"}  # none is rejected now
    assert len(list((given["output_dir"] / "data").glob("*.png"))) == 6


def test_pictures_of_the_folder_that_one_is_in(given, monkeypatch):
    monkeypatch.chdir(given["pictures"])
    assert command(*flags(**given | {"pictures": "."})) == 0
    assert predictions.Store(select.open_pool(given["pictures"]), given["model"]).missing() == []


def test_rules_on_words_need_a_predictor_of_words(given, make_config, capsys):
    RahfModel(make_config(words="none")).save_pretrained(given["model"])
    for rule in (
        {"misaligned": 0},
        {"any": [{"random": 3}, {"misaligned": 2}]},
        {"quantile": {"overall": 1, "misaligned_words": -1}, "at_least": 0.5},
    ):
        assert command(*flags(**given | {"rules": {"all": {"random": 6}, "words": rule}})) == 2
        assert "rules: `words` asks for misaligned words, but the predictor" in capsys.readouterr().err
    assert command(*flags(**given)) == 0


def test_pictures_of_a_policy_that_was_trained_anew_are_not_taken_for_its_own(drawn, tmp_path, capsys):
    policy = shutil.copytree(drawn["policy"], tmp_path / "policy")
    drawn |= {"policy": policy, "overwrite_output_dir": True}
    assert command(*flags(**drawn)) == 0
    train_anew(policy / "unet" / "diffusion_pytorch_model.safetensors")
    assert command(*flags(**drawn)) == 2
    assert f"holds a pool drawn with other settings (weights of {policy}: " in capsys.readouterr().err
    noted = drawn["pictures"] / "pool.json"
    settings = {name: value for name, value in json.loads(noted.read_text()).items() if "weights" not in name}
    noted.write_text(json.dumps(settings))  # as before weights were noted
    assert command(*flags(**drawn)) == 0


def train_anew(file):
    weights = load_file(file)
    name = next(iter(weights))
    save_file(weights | {name: weights[name] + 1}, file)
