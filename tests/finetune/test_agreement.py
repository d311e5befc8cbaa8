import io
import json
import subprocess
import sys

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from finetune.agreement import AgreementArguments, main
from finetune.choices import open_choices
from finetune.pool import open_pool, read_pictures
from reward import richhf
from reward.feedback import SCORES, Reward
from tests.reward.conftest import raw_data  # noqa: F401
from tests.test_house import ROOT


class Brightness:
    differentiable = True

    def __init__(self, weight=1.0):
        self.weight = weight

    def __call__(self, images, prompts):
        bright = images.mean((1, 2, 3))
        return Reward(total=self.weight * bright, terms={"red": images[:, 0].mean((1, 2)), "bright": bright})


class Moody:
    """Whose answer is the picture's place in the batch: noise alone."""

    differentiable = False

    def __call__(self, images, prompts):
        return Reward(total=torch.arange(len(prompts)).float())


class Broken:
    differentiable = False

    def __call__(self, images, prompts):
        return Reward(total=torch.full((len(prompts),), float("nan")))


class Fails(Brightness):
    """Fine for so many calls; each batch of pictures is asked about eight times."""

    def __init__(self, after, interrupted=False):
        super().__init__()
        self.left, self.error = (
            after,
            KeyboardInterrupt() if interrupted else RuntimeError("the licence\n[red] expired"),
        )

    def __call__(self, images, prompts):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().__call__(images, prompts)


BRIGHT = "tests.finetune.test_agreement:Brightness"
FAILS = "tests.finetune.test_agreement:Fails"
SAID = "RuntimeError: the licence [red] expired"


@pytest.fixture
def flags(write_pictures, tmp_path):
    people = [3.0, 1.0, 2.0, 2.0, 3.0, 1.0, 1.0, 2.0, 3.0]
    folder = write_pictures(tmp_path / "pictures", count=9, people=people, word=["x"] * 9)

    def make(**changes):
        settings = {
            "--pictures": str(folder),
            "--rewards": json.dumps(
                {
                    "bright": BRIGHT,
                    "dark": {"reward": BRIGHT, "kwargs": {"weight": -2.0}},
                    "jpeg": "reward.others:JpegIncompressibility",
                    "moody": "tests.finetune.test_agreement:Moody",
                }
            ),
            "--labels": "people",
            "--report": str(tmp_path / "agreement.json"),
            "--reward_batch_size": "4",
            "--use_cpu": "true",
        } | {f"--{name}": value for name, value in changes.items()}
        return [part for pair in settings.items() for part in pair if part is not None]

    return make


def test_the_figures_are_those_of_the_pictures(flags, tmp_path, capsys):
    main(flags())
    found = json.loads((tmp_path / "agreement.json").read_text())
    assert (found["pictures"], found["prompts"]) == (9, 3)
    assert found["raters"] == ["bright", "dark", "jpeg", "moody", "people"]
    assert found["within"]["bright"]["dark"]["value"] == pytest.approx(-1)
    assert found["across"]["dark"]["bright"]["value"] == pytest.approx(-1)
    assert found["accuracy"].keys() == {"people"}
    right = found["accuracy"]["people"]
    assert right["bright"]["value"] + right["dark"]["value"] == pytest.approx(1)
    assert right["bright"]["n"] == 9
    assert found["values"]["people"] == [3.0, 1.0, 2.0, 2.0, 3.0, 1.0, 1.0, 2.0, 3.0]
    assert found["spread"]["dark"] == pytest.approx(2 * found["spread"]["bright"])
    assert found["noise"]["1 pixel"]["dark"] == pytest.approx(found["noise"]["1 pixel"]["bright"])
    assert found["noise"]["jpeg 95"]["bright"] > 0
    assert found["noise"]["asked again"].items() >= {"bright": 0, "dark": 0, "jpeg": 0}.items()
    assert found["noise"]["asked again"]["moody"] > 1
    assert all(milliseconds > 0 for milliseconds in found["milliseconds"].values())
    assert found["defects"].keys() == {"smear", "blotch", "turned colours", "wrong prompt"}
    seen = found["defects"]["blotch"]
    assert seen["bright"]["value"] + seen["dark"]["value"] == 1
    assert found["defects"]["wrong prompt"]["bright"]["value"] == 0.5  # it does not read prompts
    assert found["chosen"] == {}
    said = capsys.readouterr().out
    assert "9 pictures of 3 prompts" in said
    assert "rank correlation within prompts" in said


def test_pictures_without_a_label_do_not_count_for_it(flags, write_pictures, tmp_path, caplog):
    people = [3.0, None, 2.0, 2.0, float("nan"), 1.0, 1.0, 2.0, 3.0]
    folder = write_pictures(tmp_path / "partly", count=9, people=people)
    main(flags(pictures=str(folder)))
    text = (tmp_path / "agreement.json").read_text()
    assert "NaN" not in text
    found = json.loads(text)
    assert found["values"]["people"] == [3.0, None, 2.0, 2.0, None, 1.0, 1.0, 2.0, 3.0]
    assert found["accuracy"]["people"]["bright"]["n"] == 6, "two of three prompts have three pairs"
    assert found["within"]["bright"]["dark"]["n"] == 3
    assert "2 of 9 pictures have no people, and do not count for it" in caplog.text
    few = write_pictures(tmp_path / "few", count=9, people=[3.0] + [None] * 8)
    with pytest.raises(ValueError, match="1 of 9 pictures have people; agreement needs at least 2"):
        main(flags(pictures=str(few)))


def test_the_values_are_the_rewards_own(flags, tmp_path):
    main(flags(most_pictures="5", against="jpeg"))
    found = json.loads((tmp_path / "agreement.json").read_text())
    pictures = read_pictures(open_pool(tmp_path / "pictures"), range(5))
    assert found["values"]["bright"] == pytest.approx([float(p.float().mean()) / 255 for p in pictures])
    assert found["accuracy"].keys() == {"jpeg"}
    assert found["accuracy"]["jpeg"].keys() == {"bright", "dark", "moody"}


def test_a_term_in_place_of_the_objective(flags, tmp_path):
    rewards = {"red": {"reward": BRIGHT, "term": "red"}, "dark": {"reward": BRIGHT, "kwargs": {"weight": -2.0}}}
    main(flags(rewards=json.dumps(rewards), most_pictures="4"))
    found = json.loads((tmp_path / "agreement.json").read_text())
    pictures = read_pictures(open_pool(tmp_path / "pictures"), range(4))
    assert found["values"]["red"] == pytest.approx([float(p[0].float().mean()) / 255 for p in pictures])
    assert found["values"]["dark"] == pytest.approx([-2 * float(p.float().mean()) / 255 for p in pictures])
    assert found["settings"]["rewards"] == rewards
    rewards["red"]["term"] = "blue"
    with pytest.raises(SystemExit, match="1"):
        main(flags(rewards=json.dumps(rewards)))
    failed = json.loads((tmp_path / "agreement.json").read_text())["failed"]
    assert failed == {"red": "ValueError: rewards: red has no term 'blue'; it has red, bright"}


def measured(found):
    """All that does not depend on the clock or on who was asked."""
    return {name: value for name, value in found.items() if name not in ("milliseconds", "settings", "failed")}


@pytest.mark.parametrize("after", [0, 1, 7, 8, 40, 43], ids=["at once", "asked again", "a defect", "second batch",
                                                             "a choice", "half a choice"])  # fmt: skip
def test_a_reward_that_fails_is_left_out_and_the_others_reported(flags, choices, tmp_path, capsys, after):
    """Nine pictures of two sizes, at most four at once: five batches, so that the 41st call is about choices."""
    sound = {"bright": BRIGHT, "dark": {"reward": BRIGHT, "kwargs": {"weight": -2.0}}}
    main(flags(rewards=json.dumps(sound), choices=choices, against="dark"))
    whole = json.loads((tmp_path / "agreement.json").read_text())
    assert whole["failed"] == {}
    capsys.readouterr()
    rewards = {"broken": {"reward": FAILS, "kwargs": {"after": after}}, **sound}
    with pytest.raises(SystemExit) as ended:
        main([*flags(rewards=json.dumps(rewards), choices=choices), "--against", "dark", "broken"])
    assert ended.value.code == 1
    found = json.loads((tmp_path / "agreement.json").read_text())
    assert found["failed"] == {"broken": SAID}
    assert measured(found) == measured(whole)
    assert found["milliseconds"].keys() == {"bright", "dark"}
    assert found["settings"]["rewards"].keys() == {"broken", "bright", "dark"}
    said = capsys.readouterr()
    assert "rank correlation within prompts" in said.out
    assert said.err.splitlines()[-1] == f"error: 1 of 3 rewards failed: broken: {SAID}"


def test_where_every_reward_fails_nothing_is_reported(flags, tmp_path):
    rewards = {name: {"reward": FAILS, "kwargs": {"after": after}} for name, after in (("one", 3), ("two", 9))}
    with pytest.raises(
        ValueError, match=r"every reward failed, so nothing is measured: one: .*expired; two: .*expired"
    ):
        main(flags(rewards=json.dumps(rewards)))
    assert not (tmp_path / "agreement.json").exists()


def test_an_interruption_is_no_failure_of_a_reward(flags, tmp_path):
    rewards = {"broken": {"reward": FAILS, "kwargs": {"after": 3, "interrupted": True}}, "bright": BRIGHT}
    with pytest.raises(KeyboardInterrupt):
        main(flags(rewards=json.dumps(rewards)))
    assert not (tmp_path / "agreement.json").exists()


@pytest.fixture
def rated(raw_data):  # noqa: F811
    """RichHF-18K as `reward.richhf` joins it, of pictures that all have prompts of their own."""
    for file in (raw_data / "images").iterdir():
        rows = pyarrow.parquet.read_table(file).to_pylist()
        for row in rows:
            uid = row["image_0_uid"].removeprefix("other-").replace("-", "")
            row["caption"] = " ".join([uid, *row["caption"].split()[1:]])  # as many words as were labelled
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    out = raw_data / "data"
    richhf.main(["--tfrecords", str(raw_data / "tfrecords"), "--images", str(raw_data / "images"), "--out", str(out)])
    return str(out)


def test_where_no_prompt_has_several_pictures_pairs_across_prompts_are_counted(flags, rated, tmp_path, capsys):
    main(flags(pictures=rated, split="test", labels="overall"))
    found = json.loads((tmp_path / "agreement.json").read_text())
    assert (found["pictures"], found["prompts"]) == (6, 6)
    assert found["accuracy"].keys() == {"overall", "overall, across prompts"}
    assert found["accuracy"]["overall"]["bright"] == {"value": None, "low": None, "high": None, "n": 0}
    said, true = found["values"]["bright"], found["values"]["overall"]
    right = [(said[one] > said[other]) == (true[one] > true[other]) for one in range(6) for other in range(one)]
    across = found["accuracy"]["overall, across prompts"]
    assert (across["bright"]["value"], across["bright"]["n"]) == (pytest.approx(sum(right) / 15), 15)
    assert across["bright"]["low"] < across["bright"]["value"] < across["bright"]["high"]
    assert across["bright"]["value"] + across["dark"]["value"] == pytest.approx(1)
    assert "across" in capsys.readouterr().out.partition("rank correlation")[0]
    main([*flags(pictures=rated, split="test"), "--labels", *SCORES, "--against", "jpeg"])
    assert json.loads((tmp_path / "agreement.json").read_text())["accuracy"].keys() == {"jpeg", "jpeg, across prompts"}


def test_drawn_pictures_by_the_command_itself(pipeline_folder, prompt_file, tmp_path):
    config = tmp_path / "agreement.yaml"
    config.write_text(
        f"""
        pictures: {tmp_path}/drawn
        policy: {pipeline_folder}
        prompts: {prompt_file}
        num_generations: 2
        num_inference_steps: 2
        use_cpu: true
        report: {tmp_path}/agreement.json
        rewards: {{bright: "{BRIGHT}", jpeg: "reward.others:JpegCompressibility"}}
        """
    )
    run = [sys.executable, "-m", "finetune.agreement", "--config", str(config)]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "agreement.json").read_text())
    assert (found["pictures"], found["prompts"]) == (6, 3)
    assert found["accuracy"] == {}
    assert "rank correlation within prompts" in done.stdout


def encoded(value, size=8):
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (value,) * 3).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def choices(tmp_path):
    """Pick-a-Pic's form: people take the brighter one of two pairs, the darker one of a third; a fourth is a tie."""
    pairs = [(200, 100, 1.0), (50, 80, 0.0), (90, 20, 0.0), (7, 9, 0.5)]
    rows = {
        "jpg_0": [encoded(one) for one, _, _ in pairs], "jpg_1": [encoded(other, 12) for _, other, _ in pairs],
        "caption": ["a red circle", "a red circle", "a blue square", "a star"],
        "label_0": [label for *_, label in pairs],
    }  # fmt: skip
    (tmp_path / "pairs").mkdir()
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "pairs" / "0.parquet"))
    return str(tmp_path / "pairs")


def test_what_people_chose_of_two(flags, choices, tmp_path, capsys):
    main(flags(choices=choices))
    found = json.loads((tmp_path / "agreement.json").read_text())["chosen"]
    assert (found["bright"]["value"], found["bright"]["n"]) == (pytest.approx(2 / 3), 3)
    assert found["dark"]["value"] == pytest.approx(1 / 3)
    assert "choices" in capsys.readouterr().out
    main(flags(choices=choices, most_choices="2"))
    assert json.loads((tmp_path / "agreement.json").read_text())["chosen"]["bright"]["value"] == 1


def test_a_saved_data_set_of_choices(choices, tmp_path):
    rows = datasets.load_dataset("parquet", data_files=str(tmp_path / "pairs" / "0.parquet"), split="train")
    rows = rows.cast_column("jpg_0", datasets.Image()).cast_column("jpg_1", datasets.Image())
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "saved")
    found = open_choices(tmp_path / "saved", split="test")
    assert found.captions == ["a red circle", "a red circle", "a blue square"]
    assert list(found.first) == [True, False, False]
    one, other = found.read(1)
    assert (one.shape, other.shape) == ((3, 8, 8), (3, 12, 12))
    assert (int(one.max()), int(other.max())) == (50, 80)
    with pytest.raises(ValueError, match="has no split 'train'; it has test"):
        open_choices(tmp_path / "saved")


def test_choices_that_cannot_be_used(choices, flags, tmp_path):
    rows = datasets.load_dataset("parquet", data_files=str(tmp_path / "pairs" / "0.parquet"), split="train")
    rows.remove_columns("label_0").save_to_disk(tmp_path / "no_label")
    rows.map(lambda row: {"label_0": 0.7}).save_to_disk(tmp_path / "odd")
    rows.map(lambda row: {"label_0": 0.5}).save_to_disk(tmp_path / "ties")
    rows.map(lambda row: {"jpg_0": b"no picture"}).save_to_disk(tmp_path / "broken")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("no_label", "lacks the columns label_0; it has jpg_0, jpg_1, caption"),
        ("odd", "label_0 of row 0 .* is 0.7; it is 0, 0.5 or 1"),
        ("ties", "holds no pair of which one picture was chosen"),
        ("empty", "holds neither parquet files nor a saved data set"),
        ("broken", "row 0 of .* holds no two pictures"),
    ):
        with pytest.raises(ValueError, match=message):
            main(flags(choices=str(tmp_path / name)))
    assert not (tmp_path / "agreement.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"most_choices": "0"}, "most_choices is 0"),
        ({"rewards": "{}"}, "there is no reward to look at"),
        ({"rewards": json.dumps({"people": BRIGHT})}, r"\['people'\] are names of rewards and of labels"),
        ({"rewards": json.dumps({"b": BRIGHT + "er"})}, "has no attribute Brightnesser"),
        ({"rewards": json.dumps({"b": {"reward": BRIGHT, "weight": 2}})}, "unknown key 'weight'"),
        ({"against": "judge"}, r"against names \['judge'\]"),
        ({"most_pictures": "1"}, "agreement needs at least 2"),
        ({"reward_batch_size": "0"}, "reward_batch_size is 0"),
        ({"labels": "votes"}, "has no column votes.*it has people, word"),
        ({"labels": "word"}, "word of 0.png is 'x', no finite number"),
        ({"pictures": "./nowhere"}, "there is no folder of pictures"),
        ({"rewards": json.dumps({"b": "tests.finetune.test_agreement:Broken"})}, "total is nan for the prompt 'a red"),
    ],
)
def test_mistakes_are_named(flags, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        main(flags(**changes))
    assert not (tmp_path / "agreement.json").exists()


def test_drawn_pictures_have_no_labels(flags, pipeline_folder, prompt_file, tmp_path):
    drawn = {"policy": str(pipeline_folder), "prompts": str(prompt_file), "pictures": str(tmp_path / "drawn")}
    with pytest.raises(ValueError, match=r"so they have no labels \['people'\]"):
        main(flags(**drawn))


def test_labels_are_what_rewards_are_held_against():
    settings = {"pictures": "p", "report": "r", "rewards": {"b": BRIGHT}}
    assert AgreementArguments(**settings, labels=["people"]).against == ["people"]
    assert AgreementArguments(**settings).against == []
