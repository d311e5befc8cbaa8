"""What a predictor says of a pool, kept for the next selection."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest

from finetune import predictions, select
from finetune.pool import read_pictures
from reward.predict import RichFeedbackPredictor
from tests.finetune.select_case import command, files_of, flags, lines_of


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


def test_a_damaged_part_is_predicted_again(given, caplog):
    assert command(*flags(**given)) == 0
    (part,) = Path(f"{given['pictures']}_feedback").rglob("*.parquet")
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    assert command(*flags(**given, overwrite_output_dir=True)) == 0
    assert f"{part} is damaged; what it held is predicted again" in caplog.text
    assert part.read_bytes() == whole


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


def test_pictures_of_the_folder_that_one_is_in(given, monkeypatch):
    monkeypatch.chdir(given["pictures"])
    assert command(*flags(**given | {"pictures": "."})) == 0
    assert predictions.Store(select.open_pool(given["pictures"]), given["model"]).missing() == []
