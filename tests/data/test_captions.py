"""Captions: cleaning, choice, tags, trigger words, and when an image may be mirrored."""

import numpy as np
import pytest

from latentdiff.data.captions import (
    CaptionTransform,
    clean_caption,
    edit_tags,
    label_caption,
    may_flip,
    with_trigger,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("raw", "clean", "had_controls"),
    [
        ("a cat", "a cat", False),
        ("  a \n cat\t\r\n", "a cat", False),
        ("a\x00 cat\x07", "a cat", True),
        ("a\x1b[31m cat", "a[31m cat", True),
        ("right\u202eleft", "rightleft", True),
        ("\ufeffa cat", "a cat", True),
        ("lone \ud83d half", "lone half", True),
        ("\u00a0été\u3000猫", "été 猫", False),
        ("family 👨‍👩‍👧 ❤️", "family 👨‍👩‍👧 ❤️", False),  # joiners stay
        ("", "", False),
        ("   ", "", False),
    ],
)
def test_cleaning_removes_control_characters(raw, clean, had_controls):
    assert clean_caption(raw) == (clean, had_controls)
    clean.encode()


def test_choice_among_captions_is_even_and_keyed():
    captions = ("a", "b", "c")
    chosen = [CaptionTransform().sample(captions, rng(seed)) for seed in range(600)]
    assert {chosen.count(c) > 150 for c in captions} == {True}
    assert [CaptionTransform().sample(captions, rng(seed)) for seed in range(600)] == chosen
    assert {CaptionTransform(choice="first").sample(captions, rng(seed)) for seed in range(9)} == {
        "a"
    }


def test_shuffled_tags_are_the_same_tags_with_the_first_kept():
    caption = "sks cat, red, small, on a chair, photo"
    seen = {edit_tags(caption, rng(seed), shuffle=True, keep=1) for seed in range(50)}
    assert len(seen) > 10
    for edited in seen:
        assert edited.startswith("sks cat, ")
        assert sorted(edited.split(", ")) == sorted(caption.split(", "))


def test_tags_drop_out_at_the_given_rate_but_for_the_kept_ones():
    caption = ", ".join(["keep me", *(f"tag {i}" for i in range(99))])
    counts = []
    for seed in range(40):
        tags = edit_tags(caption, rng(seed), shuffle=False, keep=1, dropout=0.3).split(", ")
        assert tags[0] == "keep me"
        assert tags == [tag for tag in caption.split(", ") if tag in tags], "order is kept"
        counts.append(len(tags) - 1)
    assert np.mean(counts) == pytest.approx(99 * 0.7, rel=0.03)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_tag_dropout_out_of_range_is_refused(dropout):
    with pytest.raises(ValueError, match="tag_dropout must be in"):
        CaptionTransform(tag_dropout=dropout).sample(["a, b"], rng())


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a dog", "sks, a dog"),
        ("a photo of SKS dog", "a photo of SKS dog"),
        ("sksdog", "sks, sksdog"),
        ("", "sks"),
    ],
)
def test_the_trigger_word_comes_once(caption, expected):
    assert with_trigger(caption, "sks") == expected


def test_prefix_and_suffix_go_around_everything():
    edits = CaptionTransform(trigger_word="sks", prefix="photo, ", suffix=", 4k")
    assert edits.sample(["dog"], rng()) == edits.fixed("dog") == "photo, sks, dog, 4k"


def test_the_caption_is_unchanged_by_default():
    caption = "two cats,  one red ,, the other not"
    assert CaptionTransform().sample([caption], rng()) == caption


@pytest.mark.parametrize(
    ("caption", "may"),
    [
        ("a cat", True),
        ("a cat looking left", False),
        ("the Right hand", False),
        ("a bright day, leftover food", True),
        ("a sign with the word STOP", False),
    ],
)
def test_captions_that_mention_sides_or_writing_forbid_the_flip(caption, may):
    assert may_flip([caption]) is may
    assert may_flip(["a dog", caption]) is may


def test_labels_are_filled_in_as_words():
    assert label_caption("a photo of a {label}", "golden_retriever") == (
        "a photo of a golden retriever"
    )
    assert label_caption("{label} {0} {label.__class__}", "x") == "x {0} {label.__class__}"


def test_wildcards_are_resolved_before_tags_and_drawn_by_the_key():
    transform = CaptionTransform(wildcards=True, trigger_word="sks")
    caption = "a {red|{dark|light} blue} {car|bike}, {label}"
    seen = {transform.sample([caption], np.random.default_rng(k)) for k in range(60)}
    colors, things = ("red", "dark blue", "light blue"), ("car", "bike")
    assert seen == {f"sks, a {one} {thing}, {{label}}" for one in colors for thing in things}
    again = [transform.sample([caption], np.random.default_rng(3)) for _ in range(2)]
    assert again[0] == again[1]
    assert transform.fixed(caption) == "sks, a red car, {label}"
    assert transform.edits_randomly


def test_captions_are_text_without_wildcards():
    rng = np.random.default_rng(0)
    assert CaptionTransform().sample(["a {b|c}"], rng) == "a {b|c}"
    assert CaptionTransform().fixed("a {b|c}") == "a {b|c}"
    assert not CaptionTransform().edits_randomly
