"""Pairs of the shapes world and edges of images: both sides of a pair in one place."""

from pathlib import Path

import numpy as np
import pytest
from fakes_data import captioned_folder
from PIL import Image

from latentdiff.data.edges import edge_mask, write_edges
from latentdiff.data.folder.folder import read_folder
from latentdiff.data.shape_pairs import shape_pairs, write_shape_pairs
from latentdiff.data.shapes import BACKGROUNDS, COLOURS, heldout_pairs, split_scenes


def test_a_layout_has_the_shapes_of_its_image_in_their_colors_and_places() -> None:
    for pair in shape_pairs("layout", 12, is_heldout=False):
        image, layout = (np.asarray(one, int) for one in (pair.image(64), pair.condition(64)))
        ground = BACKGROUNDS[pair.scene.background]
        is_whole = (image == layout).all(axis=2)
        black = (layout == BACKGROUNDS["black"]).all(axis=2)
        assert (image[black] == ground).all(axis=1).all()
        named = [COLOURS[name] for name in (pair.scene.colour, pair.scene.other_colour) if name]
        assert all((layout[is_whole & ~black] == one).all(axis=1).any() for one in named)


def test_an_edit_changes_the_color_of_the_shape_it_names_and_nothing_else() -> None:
    for pair in shape_pairs("edit", 12, is_heldout=False, pair_fraction=1.0):
        scene = pair.scene
        assert pair.caption == f"make the {scene.kind} {scene.colour}"
        assert scene.kind != scene.other_kind
        before, after = (np.asarray(one, int) for one in (pair.condition(64), pair.image(64)))
        changed = (before != after).any(axis=2)
        assert (after[changed] == COLOURS[scene.colour]).all(axis=1).mean() > 0.5
        assert (before[changed] == COLOURS[pair.colour_before]).all(axis=1).mean() > 0.5
        if scene.other_colour not in (scene.colour, pair.colour_before):
            is_other = (after == COLOURS[str(scene.other_colour)]).all(axis=2)
            assert is_other.any()
            assert not changed[is_other].any()


def test_held_out_pairs_are_of_combinations_never_seen() -> None:
    unseen = set(split_scenes()[1])
    for is_heldout in (True, False):
        for pair in shape_pairs("layout", 40, is_heldout=is_heldout):
            scene = pair.scene
            kinds = frozenset({(scene.kind, scene.colour), (scene.other_kind, scene.other_colour)})
            known = scene in unseen if scene.relation is None else kinds in heldout_pairs()
            assert known is is_heldout


@pytest.mark.parametrize("kind", ["layout", "edit", "edges"])
def test_a_folder_of_pairs_is_read_with_a_condition_for_each_image(
    tmp_path: Path, kind: str
) -> None:
    root = write_shape_pairs(tmp_path / kind, kind, num_train=6, num_test=2, size_px=32)
    for split, num in (("train", 6), ("test", 2)):
        folder = read_folder(root / split, condition="size")
        assert len(folder) == len(folder.companions("condition")[0]) == num
        assert not folder.problems
    with pytest.raises(FileExistsError, match="is not empty"):
        write_shape_pairs(root, kind)


def test_an_unknown_kind_of_pairs_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kind='depths', expected one of: layout, edit, edges"):
        write_shape_pairs(tmp_path / "pairs", "depths")


def test_edges_lie_where_colors_change_alone() -> None:
    pixels = np.full((16, 16, 3), 200, np.uint8)
    pixels[:, 8:] = (200, 90, 200)
    found = edge_mask(Image.fromarray(pixels))
    assert found[:, 7:9].all()
    assert not found[:, :5].any()
    assert not found[:, 11:].any()
    assert not edge_mask(Image.new("RGB", (16, 16), "red")).any()


def test_edges_are_written_for_the_images_that_have_none(tmp_path: Path) -> None:
    root = captioned_folder(tmp_path / "photos", 3)
    Image.new("RGB", (40, 32)).save(root / "0.condition.png")
    Image.new("L", (40, 32), 255).save(root / "1.mask.png")
    assert write_edges(root) == 2
    assert write_edges(root) == 0
    assert Image.open(root / "0.condition.png").getbbox() is None  # as it was
    assert len(read_folder(root, condition="size").companions("condition")[0]) == 3
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no images"):
        write_edges(tmp_path / "empty")
