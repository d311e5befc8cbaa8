"""The table of RAHF's variants: its settings are the command's own, its arithmetic that of hand and pencil."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import rahf_variants
import torch
from rahf_variants import GOALS, VARIANTS, encoders_alone, metric_rows

from reward.arguments import parse_arguments
from reward.checkpoints import COMPLETE
from reward.model import RahfModel
from reward.train import build_model
from reward.train_config import RahfArguments, RahfTrainingArguments
from tests.test_house import ROOT


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_told_in_the_commands_own_words(variant, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    parse_arguments([RahfArguments, RahfTrainingArguments], [*VARIANTS[variant], "--output_dir", str(tmp_path)])


def seed(known: float, held_out: float, own: float) -> dict:
    values = {("of ceiling", "other prompts"): known, ("of ceiling", "listed prompts"): held_out}
    values |= {("predictor", "all"): own, ("of ceiling", "all"): own / 0.5}
    return {key: dict.fromkeys(GOALS, value) for key, value in values.items()}


def test_shares_and_differences_are_paired_by_seed():
    kept = {
        "default": [seed(0.8, 0.7, 0.5), seed(0.9, 0.9, 0.6)],
        "pooled": [seed(0.9, 0.8, 0.6), seed(1.0, 0.9, 0.7)],
    }
    rows = {row.name: row for row in metric_rows("pooled", kept, whole=True)}
    of_ceiling = rows["pooled: cc misalignment, of the ceiling"]
    assert of_ceiling.value == pytest.approx(0.95)
    assert (of_ceiling.goal, of_ceiling.holds) == (">= 0.8", True)
    # Student's quantile of one degree of freedom, times the standard error of 0.9 and 1.0.
    assert of_ceiling.high - of_ceiling.value == pytest.approx(12.7062 * 0.05, rel=1e-4)
    less = rows["pooled: cc misalignment, of the ceiling, less the default's"]
    assert (less.value, less.low, less.high) == pytest.approx((0.1, 0.1, 0.1))
    assert rows["pooled: f1 words"].value == pytest.approx(0.65)
    assert rows["pooled: f1 words, of the ceiling, all pictures"].value == pytest.approx(1.3)
    lower = rows["pooled: f1 words, lower on held-out"]
    assert (lower.value, lower.holds) == (pytest.approx(0.1), False)
    short = {row.name: row.goal for row in metric_rows("default", kept, whole=False)}
    assert set(short.values()) == {None}, "aims are about whole trainings"
    assert not any("less the default's" in name for name in short)


def test_a_training_is_told_by_epochs(tmp_path):
    logs = [
        {"epoch": 0.5, "loss": 3.0}, {"epoch": 1.0, "loss": 1.0}, {"epoch": 1.0, "eval_loss": 1.5, "eval_runtime": 9.0},
        {"epoch": 1.5, "loss": 0.5}, {"epoch": 2.0, "eval_loss": 1.25, "eval_cc_implausibility": 0.25},
    ]  # fmt: skip
    for step, kept in ((9, logs[:3]), (18, logs)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"log_history": kept}))
    assert rahf_variants.curves(tmp_path) == {
        "loss in epoch 1": 2.0, "loss in epoch 2": 0.5, "loss on dev after epoch 1": 1.5,
        "loss on dev after epoch 2": 1.25, "cc_implausibility on dev after epoch 2": 0.25,
    }  # fmt: skip


def test_a_finished_training_is_kept_and_a_killed_one_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    started = []

    def run(command, check, env):
        folder = Path(command[command.index("--output_dir") + 1]).name
        started.append((folder, "--resume_from_checkpoint" in command, env["OMP_NUM_THREADS"]))

    monkeypatch.setattr(rahf_variants.subprocess, "run", run)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    options = SimpleNamespace(data="data", pretrained="rahf", epochs=2, quick=False, jobs=2)
    done, killed, early, new = (tmp_path / name for name in ("done", "killed", "early", "new"))
    for file in (done / "config.json", killed / "checkpoint-219" / COMPLETE, early / "checkpoint-219" / "config.json"):
        file.parent.mkdir(parents=True)
        file.touch()
    for folder in (done, killed, early, new):
        rahf_variants.train(folder, VARIANTS["default"], 0, options)
    assert started == [("killed", True, "1"), ("early", False, "1"), ("new", False, "1")]
    with pytest.raises(SystemExit, match="holds a training with other epochs, settings; give another --work"):
        rahf_variants.train(new, VARIANTS["pooled"], 0, SimpleNamespace(**{**vars(options), "epochs": 10}))


@pytest.mark.parametrize(("jobs", "threads"), [(1, "7"), (2, "1")])
def test_a_training_is_judged_once_on_one_thread_beside_others(tmp_path, monkeypatch, jobs, threads):
    started = []

    def run(command, env, **how):
        started.append((command[command.index("--model") + 1], command[command.index("--raters") + 1]))
        assert env["OMP_NUM_THREADS"] == threads
        (tmp_path / rahf_variants.REPORT).touch()

    monkeypatch.setattr(rahf_variants.subprocess, "run", run)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    options = SimpleNamespace(data=Path("data"), jobs=jobs)
    for _ in range(2):
        rahf_variants.judge(tmp_path, Path("raters"), Path("prompts.txt"), options)
    assert started == [(str(tmp_path), "raters")]


def test_without_its_heads_a_checkpoint_is_its_encoders(tmp_path):
    """The command takes it, and calls every head new, and nothing else."""
    whole = ROOT / "tinyworld/assets/rahf"
    folder = encoders_alone(whole, tmp_path / "encoders")
    assert encoders_alone(tmp_path / "nowhere", folder) == folder  # it is there
    model, _, new = build_model(RahfArguments(model=str(folder), data="unused"))
    heads = {name for name, _ in model.named_parameters() if "_head" in name.partition(".")[0]}
    assert {name.partition(".")[0] for name in heads} == {"word_head", "score_heads", "heatmap_heads"}
    assert new == heads
    kept = RahfModel.from_pretrained(whole).state_dict()
    assert all(torch.equal(weight, kept[name]) for name, weight in model.state_dict().items() if name not in heads)
