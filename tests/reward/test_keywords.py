import pytest

from reward.keywords import format_labels, join, mark, parse_labels, tokenize, unmark


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("a red cat", ["a", "red", "cat"]),
        ('A "cat": sleeping, or not? No! Yes; maybe...', ["A", "cat", "sleeping", "or", "not", "No", "Yes", "maybe"]),
        ("  two  spaces ", ["two", "spaces"]),
        ("it's well-made (really)", ["it's", "well-made", "(really)"]),
        ("a\nb\tc", ["a\nb\tc"]),  # only the space separates
        (" ,.?!", []),
        ("", []),
    ],
)
def test_tokenize(prompt, tokens):
    assert tokenize(prompt) == tokens
    assert tokenize(join(tokens)) == tokens


def test_mark_and_unmark_are_inverse():
    tokens, labels = ["a", "_0", "red", "cat"], [0, 0, 1, 1]
    assert mark(tokens, labels) == "a _0 red_0 cat_0"
    assert unmark(mark(tokens, labels)) == (tokens, labels)
    assert unmark("") == ([], [])


def test_mark_wants_a_label_a_token():
    with pytest.raises(ValueError, match="2 tokens have 1 labels"):
        mark(["a", "b"], [1])


def test_labels_of_the_file_are_the_other_way_round():
    assert parse_labels("1 1 0") == [0, 0, 1]
    assert format_labels([0, 0, 1]) == "1 1 0"
    assert parse_labels("") == []
    with pytest.raises(ValueError, match="2"):
        parse_labels("1 2")
