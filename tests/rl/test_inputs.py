import pytest

from rl.inputs import make_reward, read_prompts
from tests.rl.toy_rewards import Redness


def test_blank_lines_are_skipped_and_counted(tmp_path, caplog):
    (tmp_path / "prompts.txt").write_text("\ufeffa cat\n\n  a dog  \r\n   \n", encoding="utf-8")
    assert read_prompts(tmp_path / "prompts.txt") == ["a cat", "a dog"]
    assert "2 blank lines skipped, 2 prompts" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no prompt"), (b"\n \n", "holds no prompt"), (b"caf\xe9\n", "not UTF-8"), (None, "cannot read")],
)
def test_unusable_prompt_files(tmp_path, content, message):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value)


def test_rewards_are_named_by_module_and_attribute():
    assert make_reward("tests.rl.toy_rewards:Redness", {"weight": 2.0}).weight == 2.0
    assert make_reward("tests.rl.toy_rewards:brightness").__name__ == "brightness"  # not a class: taken as it is
    assert isinstance(make_reward("tests.rl.toy_rewards:Redness"), Redness)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("tests.rl.toy_rewards", {}, "package.module:Attribute"),
        ("tests.rl.no_such:Thing", {}, "no module tests.rl.no_such"),
        ("tests.rl.toy_rewards:Thing", {}, "no attribute Thing"),
        ("tests.rl.toy_rewards:Redness", {"wait": 1}, r"unexpected keyword argument 'wait'.*it takes \(weight"),
        ("tests.rl.toy_rewards:torch", {"a": 1}, "not a class"),
        ("tests.rl.toy_rewards:torch", {}, "is a module, which cannot be called"),
        ("tests.rl.toy_rewards:Uncallable", {}, "is a Uncallable, which cannot be called"),
        (3, {}, "3 does not name a reward"),
    ],
)
def test_rewards_that_cannot_be_made(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_reward(name, kwargs)
