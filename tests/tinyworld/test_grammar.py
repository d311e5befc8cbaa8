import numpy as np
import pytest

from tinyworld.grammar import (
    COLOURS,
    ROOMY,
    SHAPES,
    WORDS,
    Noun,
    all_compositions,
    draw_held_out,
    draw_request,
    held_out_compositions,
    is_held_out,
    parse,
)
from tinyworld.scenes import draw_scene


@pytest.fixture(scope="module")
def requests():
    rng = np.random.default_rng(0)
    return [draw_request(rng) for _ in range(2000)]


def test_captions_parse_back_to_the_same_request(requests):
    for request in requests:
        assert parse(str(request)) == request


def test_word_indices_point_at_the_words_they_name(requests):
    for request in requests:
        words = str(request).split()
        assert set(words) <= set(WORDS)
        for noun in request.nouns:
            assert words[noun.first_word + 1] == noun.colour
            assert words[noun.first_word + 2].startswith(noun.shape)
        if request.relation:
            assert " ".join(words[index] for index in request.relation_words) == request.relation


def test_drawn_requests_can_be_drawn(requests):
    for request in requests:
        assert 1 <= request.things <= 3
        if request.relation == "inside":
            inner, outer = request.nouns
            assert outer.shape in ROOMY
            assert inner.colour != outer.colour, "it could not be seen"


def test_every_word_and_form_occurs(requests):
    captions = [str(request) for request in requests]
    assert {word for caption in captions for word in caption.split()} == set(WORDS)
    assert {request.relation for request in requests} == {None, "left of", "above", "inside"}
    assert {request.things for request in requests} == {1, 2, 3}


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("", "ends where"),
        ("a red", "ends where"),
        ("four red circles", "'four' is no count"),
        ("a mauve circle", "'mauve' is no colour"),
        ("a red circles", "'circles' is no shape"),
        ("two red circle", "'circle' is no shape"),
        ("a red circle beside a blue star", "'beside' joins nothing"),
        ("a red circle and a blue star above a pink cross", "first two nouns"),
        ("a red circle and a red circle", "twice"),
        ("two red circles and two blue stars", "at most 3"),
        ("two red circles above a blue star", "single things"),
        ("a red circle inside a blue star", "nothing fits inside a star"),
    ],
)
def test_bad_captions_are_named(caption, message):
    with pytest.raises(ValueError, match=message):
        parse(caption)


def test_compositions_are_pairs_and_counts():
    request = parse("two red circles and a blue square")
    assert request.compositions == {"blue square + red circle", "two red circles"}
    assert request.nouns == (Noun(2, "red", "circle", 0), Noun(1, "blue", "square", 4))
    kinds = len(COLOURS) * len(SHAPES)
    assert len(set(all_compositions())) == kinds * (kinds - 1) // 2 + 2 * kinds


def test_held_out_list_is_of_the_grammar_and_deterministic():
    assert held_out_compositions() <= set(all_compositions())
    assert len(held_out_compositions()) >= 100
    assert draw_held_out(0.2, 1) == draw_held_out(0.2, 1)


def test_training_scenes_are_never_held_out(requests):
    rng = np.random.default_rng(1)
    assert any(is_held_out(request) for request in requests)
    assert not any(is_held_out(draw_scene(rng, flawed=0.3)[0]) for _ in range(500))
