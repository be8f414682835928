"""Three hundred random calls; `python tests/fuzz_pipeline.py` makes ten thousand."""

from fuzz_pipeline import fuzz


def test_random_arguments_draw_or_are_refused_by_name():
    counts = fuzz(300)
    assert min(counts.values()) > 50
