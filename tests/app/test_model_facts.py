"""What the page tells of a model."""

import pytest
from fakes_app import EXAMPLES
from fakes_pipeline import SIZE

from latentdiff.app.model_facts import OWN_SCHEDULER, card_summary
from latentdiff.models.model_path import BUNDLED
from latentdiff.pipeline.files.model_card import model_card
from latentdiff.pipeline.files.model_info import ModelInfo, read_model_info


def test_facts_come_from_the_card_the_training_and_the_networks(session):
    facts = session.facts
    assert facts.summary == "Hearts and apples at 32 px, for tests."
    rows = dict(facts.rows)
    assert (rows["Size"], rows["Trained on"], rows["Training steps"]) == (
        f"{SIZE} x {SIZE} px",
        "hearts",
        "1,200",
    )
    assert (facts.examples, facts.guidance_scale) == (EXAMPLES, 2.0)
    assert facts.schedulers[0] == OWN_SCHEDULER
    assert "ddim" in facts.schedulers


def test_the_bundled_model_tells_what_it_draws():
    folder = BUNDLED["latentdiff-mini"]
    assert card_summary((folder / "README.md").read_text()).startswith("Emoji in eight styles")
    assert "a cat" in read_model_info(folder).example_prompts


def test_a_card_that_training_wrote_says_nothing_of_subjects_and_has_the_prompts():
    card = model_card(ModelInfo(steps=3, example_prompts=EXAMPLES), name="m")
    assert card_summary(card) == ""
    assert "widget:\n- text: a red heart\n" in card
    assert "widget" not in model_card(ModelInfo(steps=3), name="m")


@pytest.mark.parametrize(
    ("size", "expected"),
    [((64, 64), (32, 32)), ((4000, 2000), (44, 24)), ((10, 1000), (4, 64))],
)
def test_an_image_s_proportions_are_kept_at_the_trained_area(session, size, expected):
    assert session.facts.size_for(*size) == expected


def test_sizes_far_beyond_the_trained_one_are_warned_of(session):
    assert session.facts.size_warning(44, 44) == ""
    warning = session.facts.size_warning(64, 32)
    assert "trained at 32 x 32 pixels; at 64 x 32" in warning
    assert "Better: 44 x 24" in warning
