"""The demo's proof: a run is done once, under the name of all it comes of; and the base trained on is another."""

from pathlib import Path

import demo_proof
import long_runs
import numpy as np
import pytest
import torch
import yaml
from demo_proof import Proof, flawed

from tinyworld.grammar import parse
from tinyworld.judge import judge
from tinyworld.scenes import lay_out, render

CONFIG = Path("configs/ddpo_tinyworld.yaml")


@pytest.fixture
def commands(monkeypatch):
    """What was run, without running it: each run leaves `finished.json`."""
    asked = []

    def run(command, check):
        asked.append(command)
        folder = Path(command[command.index("--output_dir") + 1])
        folder.mkdir(parents=True)
        (folder / "finished.json").write_text("{}")

    monkeypatch.setattr(demo_proof.subprocess, "run", run)
    return asked


def test_a_run_is_done_once_and_again_where_anything_differs_that_it_comes_of(tmp_path, commands, monkeypatch):
    proof = Proof(CONFIG, tmp_path, 2)
    folder = proof.run(0)
    assert Proof(CONFIG, tmp_path, 2).run(0) == folder
    assert len(commands) == 1
    config = tmp_path / CONFIG.name
    config.write_text(yaml.safe_dump(yaml.safe_load(CONFIG.read_text()) | {"learning_rate": 1e-3}))
    others = [Proof(config, tmp_path, 2), Proof(CONFIG, tmp_path, 2, ["--beta", "0.1"]), Proof(CONFIG, tmp_path, 3)]
    monkeypatch.setattr(demo_proof, "assets_digest", lambda: "others")
    others.append(Proof(CONFIG, tmp_path, 2))
    assert len({one.run(0) for one in others} | {folder}) == len(commands) == 5


def test_what_the_base_draws_is_drawn_once_whatever_the_run(tmp_path):
    proof, other = Proof(CONFIG, tmp_path, 2), Proof(CONFIG, tmp_path, 2, ["--beta", "0.1"])
    pictures = np.arange(12).reshape(1, 2, 2, 3)
    proof.pictures("base", lambda: pictures)
    assert np.array_equal(other.pictures("base", lambda: pytest.fail("drawn again")), pictures)
    proof.pictures("after0", lambda: pictures)
    assert np.array_equal(other.pictures("after0", lambda: pictures + 1), pictures + 1), "another run's"
    another = Proof(CONFIG, tmp_path, 1)
    assert np.array_equal(another.pictures("base", lambda: pictures[:, :1]), pictures[:, :1]), "of other prompts"


def test_other_weights_are_other_assets(tmp_path, monkeypatch):
    monkeypatch.setattr(long_runs, "ASSETS", tmp_path)
    digests = []
    for name, content in (("rahf/model.safetensors", "a"), ("rahf/model.safetensors", "b"), ("prompts_train.txt", "c")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
        digests.append(long_runs.assets_digest.__wrapped__())
    (tmp_path / "ceiling.json").write_text("{}")
    (tmp_path / "rahf/README.md").write_text("for people")
    assert long_runs.assets_digest.__wrapped__() == digests[-1], "no training reads them"
    assert len(set(digests)) == 3


def test_the_base_is_trained_on_in_a_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_proof, "POOL", demo_proof.BATCH)
    proof = Proof(CONFIG, tmp_path, 1)
    before = [weight.detach().clone() for weight in proof.base.unet.parameters()]
    trained = proof.trained_on(2, 1e-3)
    assert all(map(torch.equal, before, proof.base.unet.parameters()))
    after = [weight.detach() for weight in trained.unet.parameters()]
    moved = max(float((new - old).abs().max()) for new, old in zip(after, before, strict=True))
    assert 1e-4 < moved < 5e-3, "two updates by Adam at 1e-3 at most, while it warms up"
    assert trained.scheduler.config.prediction_type == "v_prediction"


def test_flaws_are_counted_by_picture():
    picture = render(lay_out(parse("two red circles"), np.random.default_rng(0)).things)
    verdicts = [judge(picture, caption) for caption in ("two red circles", "two blue circles", "three red circles")]
    shares = {kind: round(3 * flawed(verdicts, kind)) for kind in ("wrong colour", "missing", "malformed")}
    assert shares == {"wrong colour": 1, "missing": 1, "malformed": 0}
