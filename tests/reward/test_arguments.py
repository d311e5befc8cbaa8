import subprocess
import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest
from tqdm.auto import tqdm

from reward.arguments import ArgumentsError, main_guard, parse_arguments, read_prompt_file


@dataclass
class Model:
    model: str = field(metadata={"help": "folder"})
    heatmap_head: Literal["paper", "light"] = "light"
    weights: dict[str, float] = field(default_factory=dict)


@dataclass
class Training:
    learning_rate: float = 1e-3
    max_steps: int = 10
    verbose: bool = False
    train_steps: list[int] = field(default_factory=lambda: [1, 2])

    def __post_init__(self):
        if self.max_steps < 0:
            raise ValueError("max_steps must be >= 0")


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return str(path)

    return write


def parse(argv):
    return parse_arguments([Model, Training], argv)


@pytest.mark.parametrize("spelling", ["two words", "equals sign"])
def test_yaml_and_flags_are_merged_and_the_flag_wins(config, spelling):
    path = config("model: a\nlearning_rate: 1e-4\nmax_steps: 5\nweights: {x: 1.0}\ntrain_steps: [3]\nverbose: true\n")
    argv = ["--config", path] if spelling == "two words" else [f"--config={path}"]
    model, training = parse([*argv, "--max_steps", "7"])
    assert (model.model, model.weights) == ("a", {"x": 1.0})
    assert training == Training(1e-4, 7, True, [3])


def test_a_merged_key_that_is_given_again_is_no_twin(config):
    model, _ = parse(["--config", config("model: a\nweights: {<<: &all {x: 1, y: 2}, y: 3}\n")])
    assert model.weights == {"x": 1, "y": 3}


def test_a_slice_is_no_number_of_base_60(config):
    """Which YAML 1.1 makes of a bare 1:3."""
    model, _ = parse(["--config", config("model: 1:3\n")])
    assert model.model == "1:3"
    model, _ = parse(["--config", config("model: 1:30.5\n")])
    assert model.model == "1:30.5"


def test_mapping_and_list_on_the_command_line():
    model, training = parse(["--model", "a", "--weights", '{"y": 2}', "--train_steps", "4", "5"])
    assert model.weights == {"y": 2}
    assert training.train_steps == [4, 5]


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--model", "a", "--learning_rte", "1"], ["--learning_rte", "learning_rate"]),
        (["--model", "a", "--max-step=3"], ["--max-step", "max_steps"]),
        (["--model", "a", "--learn", "1"], ["--learn"]),  # no abbreviations
        (["--model", "a", "--max_steps", "many"], ["max_steps", "many"]),
        (["--model", "a", "--heatmap_head", "big"], ["heatmap_head", "big", "light"]),
        (["--model", "a", "--weights", "x=1"], ["x=1", "JSON"]),
        (["--model", "a", "--weights", "[1]"], ["[1]"]),
        (["--model", "a", "--weights", '{"x": 1, "y": {"x": 1, "x": 2}}'], ["weights", "`x` is given twice"]),
        ([], ["--model"]),
        (["--config"], ["--config"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "No such file"]),
    ],
)
def test_wrong_flags_are_named(argv, names):
    with pytest.raises(ArgumentsError) as caught:
        parse(argv)
    assert all(name in str(caught.value) for name in names)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("model: a\nmax_step: 3\n", ["max_step", "max_steps"]),
        ("model: a\nmax_steps: many\n", ["max_steps", "many"]),
        ("model: a\nmax_steps: 2.5\n", ["max_steps", "2.5"]),
        ("model: a\nlearning_rate: [1]\n", ["learning_rate"]),
        ("model: a\nheatmap_head: big\n", ["heatmap_head", "big", "light"]),
        ("model: a\nweights: 3\n", ["weights", "3"]),
        ("model: a\nweights: {x: 1, x: 2}\n", ["line 2", "`x` is given twice"]),
        ("model: a\nmax_steps: 3\nmodel: b\n", ["line 3", "`model` is given twice"]),
        ("- model\n", ["mapping"]),
        ("model: {\n", ["YAML"]),
    ],
)
def test_wrong_yaml_is_named(config, text, names):
    with pytest.raises(ArgumentsError) as caught:
        parse(["--config", config(text)])
    assert all(name in str(caught.value) for name in names)


def test_config_that_is_not_utf8(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"model: \xff\xfe")
    with pytest.raises(ArgumentsError, match="UTF-8"):
        parse(["--config", str(tmp_path / "c.yaml")])


def test_checks_of_the_dataclass_reach_the_user():
    with pytest.raises(ValueError, match="max_steps must be"):
        parse(["--model", "a", "--max_steps", "-1"])


def test_guard_prints_one_line_for_the_users_mistakes(capsys):
    with pytest.raises(SystemExit) as caught:
        main_guard(parse, ["--nothing"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_guards_line_is_its_own_beside_an_open_progress_bar(capsys):
    bar = tqdm(total=2, mininterval=0)  # the Trainer's, too, is open when an error leaves the training

    def fail(argv):
        bar.update()
        raise ValueError("no such picture")

    with pytest.raises(SystemExit):
        main_guard(fail)
    shown = [line.rpartition("\r")[2] for line in capsys.readouterr().err.split("\n")]
    bar.close()
    assert "error: no such picture" in shown


def test_guard_keeps_the_traceback_of_a_librarys_error():
    import json

    with pytest.raises(ValueError, match="Expecting"):
        main_guard(lambda argv: json.loads("{"))


def test_guard_exit_codes(capsys):
    with pytest.raises(SystemExit) as caught:
        main_guard(lambda argv: "fine")
    assert caught.value.code == 0

    def stop(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        main_guard(stop)
    assert caught.value.code == 130


@pytest.mark.parametrize(("tidy", "left"), [("True", False), ("False", True)])
def test_a_command_that_is_told_to_end_takes_its_temporary_folder_away(tmp_path, tidy, left):
    code = f"""
import tempfile, time
from reward.arguments import main_guard
def main(argv):
    with tempfile.TemporaryDirectory(dir={str(tmp_path)!r}):
        print("begun", flush=True)
        time.sleep(60)
main_guard(main, [], tidy={tidy})"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout.readline() == "begun\n"
        running.terminate()
        assert running.wait(timeout=60) == (-15 if left else 143)
    assert bool(list(tmp_path.iterdir())) == left


def test_help_is_printed_by_a_real_command():
    code = "from reward.arguments import *; from tests.reward.test_arguments import *; main_guard(parse)"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "--learning_rate" in done.stdout


def test_blank_lines_are_skipped_and_counted(tmp_path, caplog):
    (tmp_path / "prompts.txt").write_text("\ufeffa cat\n\n  a dog  \r\n   \n", encoding="utf-8")
    assert read_prompt_file(tmp_path / "prompts.txt") == ["a cat", "a dog"]
    assert "2 blank lines skipped, 2 prompts" in caplog.text


def test_only_line_ends_end_a_prompt(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("a\u2028cat\r\na\u0085dog\ra\fhorse".encode())
    assert read_prompt_file(tmp_path / "prompts.txt") == ["a\u2028cat", "a\u0085dog", "a\fhorse"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompt"),
        (b"\n \n", "holds no prompt"),
        (b"caf\xe9\n", "not UTF-8"),
        (b"a cat\n\n ?! - \n", r"line 3 of the prompt file .* has no words: '\?! -'"),
        (None, "cannot read"),
    ],
)
def test_unusable_prompt_files(tmp_path, content, message):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_prompt_file(path)
    assert str(path) in str(caught.value)


def test_one_value_in_yaml_stands_for_a_list_of_one(tmp_path):
    @dataclass
    class Sizes:
        size: list[int] | None = None

    (tmp_path / "one.yaml").write_text("size: 64\n")
    (tmp_path / "none.yaml").write_text("size:\n")
    (tmp_path / "two.yaml").write_text("size: [64, 32]\n")
    read = [
        parse_arguments([Sizes], ["--config", str(tmp_path / f"{name}.yaml")])[0] for name in ("one", "none", "two")
    ]
    assert [sizes.size for sizes in read] == [[64], None, [64, 32]]
