import pytest
import torch

from reward.predict import RichFeedbackPredictor
from reward.rich import RichReward

PROMPTS = ["a red circle", "blue", ""]


@pytest.fixture
def images():
    return torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def test_reward_by_hand(predictor, images):
    reward = RichReward(
        predictor,
        score_weights={"overall": 2.0, "alignment": -1.0},
        penalty_weights={"implausibility": 0.5, "misalignment": 0.0},
        word_weight=3.0,
    )(images, PROMPTS)
    feedback = predictor(images, PROMPTS)
    wrong = torch.tensor([feedback.misaligned[0].mean(), feedback.misaligned[1].mean(), 0.0])
    total = 2 * feedback.scores["overall"] - feedback.scores["alignment"] - 3 * wrong
    torch.testing.assert_close(reward.total, total)
    assert set(reward.penalties) == {"implausibility"}
    torch.testing.assert_close(reward.penalties["implausibility"], 0.5 * feedback.heatmaps["implausibility"])
    torch.testing.assert_close(
        reward.objective, total - 0.5 * feedback.heatmaps["implausibility"].mean((1, 2)), atol=1e-6, rtol=0
    )
    assert [len(words) for words in reward.word_penalties] == [3, 1, 0]
    torch.testing.assert_close(torch.stack([words.sum() for words in reward.word_penalties]), 3 * wrong)
    torch.testing.assert_close(reward.terms["misaligned_words"], wrong)
    assert all(value.shape == (3,) for value in reward.terms.values())
    wrong = [words > predictor.word_threshold for words in feedback.misaligned]
    assert all(torch.equal(*pair) for pair in zip(reward.wrong_words, wrong, strict=True))
    assert list(reward.heatmaps) == ["implausibility", "misalignment"], "those that cost nothing too"
    assert all(torch.equal(maps, feedback.heatmaps[name]) for name, maps in reward.heatmaps.items())


def test_the_default_is_the_overall_score(model_folder, predictor, images):
    reward = RichReward(model_folder)(images, PROMPTS)
    assert torch.equal(reward.total, predictor(images, PROMPTS).scores["overall"])
    assert reward.penalties == {}
    assert reward.word_penalties is None


@pytest.mark.parametrize("word_weight", [0.0, 1.0])
@pytest.mark.parametrize("penalty_weights", [None, {"implausibility": 0.0}, {"misalignment": 0.5}])
def test_what_it_gives_is_known_before_its_model(predictor, images, penalty_weights, word_weight):
    settings = {"penalty_weights": penalty_weights, "word_weight": word_weight}
    reward = RichReward(predictor, **settings)(images, PROMPTS)
    given = RichReward.gives(model="nowhere", **settings)
    assert ("penalties" in given) == bool(reward.penalties)
    assert ("word_penalties" in given) == (reward.word_penalties is not None)


def test_it_is_differentiable(predictor, images):
    reward_fn = RichReward(predictor, penalty_weights={"implausibility": 1.0}, word_weight=1.0)
    assert reward_fn.differentiable
    images.requires_grad_()
    reward_fn(images, PROMPTS).objective.sum().backward()
    assert (images.grad.abs().sum((1, 2, 3)) > 0).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"score_weights": {"alignment": 1.0}},
        {"score_weights": {}, "penalty_weights": {"implausibility": 1.0}},
        {"score_weights": {}, "penalty_weights": {"misalignment": 1.0}},
        {"score_weights": {}, "word_weight": 1.0},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_the_gradient_of_each_part_is_its_slope(model, tokenizer, settings):
    """Of scores, of either map, and through the words' tagging head."""
    reward_fn = RichReward(RichFeedbackPredictor(model.double(), tokenizer), **settings)
    image = torch.rand(1, 3, 40, 48, generator=torch.Generator().manual_seed(3)).requires_grad_()
    direction = torch.randn(1, 3, 40, 48, generator=torch.Generator().manual_seed(4))
    (slope,) = torch.autograd.grad(reward_fn(image, ["a red circle"]).objective.sum(), image)
    step = 5e-4
    with torch.no_grad():
        up, down = (reward_fn(image + sign * step * direction, ["a red circle"]).objective for sign in (1, -1))
    expected = (slope * direction).sum().item()
    assert abs(expected) > 1e-6
    assert ((up - down) / (2 * step)).item() == pytest.approx(expected, rel=0.03)


def test_nan_is_not_hidden(predictor, images):
    images[0, 0, 0, 0] = float("nan")
    reward = RichReward(predictor, penalty_weights={"implausibility": 1.0}, word_weight=1.0)(images, PROMPTS)
    assert reward.total.isnan().tolist() == [True, False, False]
    assert reward.objective.isnan().tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score_weights": {"beauty": 1}}, "score_weights has no beauty; it may have plausibility"),
        ({"penalty_weights": {"overall": 1}}, "penalty_weights has no overall"),
        ({"penalty_weights": {"implausibility": -1}}, "must not be negative"),
        ({"word_weight": -0.5}, "must not be negative"),
    ],
)
def test_wrong_settings_are_named(predictor, settings, message):
    with pytest.raises(ValueError, match=message):
        RichReward(predictor, **settings)


def test_it_tells_what_a_watch_wants_to_know(predictor):
    reward = RichReward(predictor, {"overall": 1.0, "alignment": 0.0}, batch_size=2)
    images = torch.rand(3, 3, 20, 24, generator=torch.Generator().manual_seed(0))
    seen = reward.features(images)
    assert reward.ranges == {"overall": (0.0, 1.0)}
    assert seen.shape == (3, 16)  # the vision encoder's width
    torch.testing.assert_close(seen[1:2], reward.features(images[1:2]))
    assert not torch.allclose(seen[0], seen[1])
    assert torch.equal(reward.features(images.requires_grad_()), seen)
    assert not seen.requires_grad
