"""Windows cover a canvas evenly, and agreeing predictions are their own mean."""

from itertools import pairwise

import pytest
import torch

from latentdiff.diffusion.windows import average_windows, place_windows


@pytest.mark.parametrize("size", [(8, 8), (8, 20), (19, 33), (5, 9)])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.9])
def test_windows_cover_the_canvas_and_overlap_at_least_as_asked(size, overlap):
    windows = place_windows(size, 8, overlap=overlap)
    covered = torch.zeros(size)
    for window in windows:
        assert window.crop(covered).shape == (min(8, size[0]), min(8, size[1]))
        window.crop(covered).add_(1)
    assert covered.min() >= 1
    lefts = sorted({window.left for window in windows})
    assert lefts[-1] == max(0, size[1] - 8)
    assert all(8 - (b - a) >= int(8 * overlap) for a, b in pairwise(lefts))


def test_an_overlap_that_floats_round_takes_no_further_windows():
    assert len(place_windows((40, 80), 40, overlap=0.9)) == 11  # 4 apart


def test_a_prediction_that_depends_on_each_place_alone_is_kept():
    x = torch.randn(2, 3, 19, 33, generator=torch.Generator().manual_seed(0))
    windows = place_windows((19, 33), 8, overlap=0.5)
    mean = average_windows(lambda window: window.crop(x) ** 2, windows, size=(19, 33))
    torch.testing.assert_close(mean, x**2)


def test_a_window_counts_less_towards_its_edges_so_that_none_is_seen():
    windows = place_windows((1, 12), 8, overlap=0.5)
    mean = average_windows(
        lambda window: torch.full((1, 1, 1, 8), float(window.left)), windows, size=(1, 12)
    )[0, 0, 0]
    assert mean.tolist() == [0] * 4 + sorted(mean[4:8].tolist()) + [4] * 4
    assert mean.diff().max() < 1.5


def test_windows_can_be_differentiated():
    x = torch.ones(1, 1, 4, 12, requires_grad=True)
    windows = place_windows((4, 12), 8, overlap=0.5)
    average_windows(lambda window: 3 * window.crop(x), windows, size=(4, 12)).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 3))


def test_a_window_is_the_same_part_of_a_larger_canvas():
    x = torch.arange(12.0 * 20).view(12, 20)
    larger = x.repeat_interleave(2, 0).repeat_interleave(2, 1)
    window = place_windows((12, 20), 8, overlap=0.5)[-1]
    assert torch.equal(window.crop(larger, factor=2)[::2, ::2], window.crop(x))
