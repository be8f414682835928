"""Three hundred random calls; `python tests/fakes/fuzz_pipeline.py` makes ten thousand."""

from fuzz_pipeline import fuzz


def test_random_arguments_give_an_image_or_an_error_that_names_one():
    counts = fuzz(300)
    assert min(counts.values()) > 50
