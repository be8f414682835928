"""scripts/cache_latents.py: builds once, verifies, and removes only with --delete."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from fakes_models import make_vae
from fakes_shapes import write_three_shapes
from fakes_training import SETTINGS, arguments
from safetensors.torch import load_file, save_file

from latentdiff.config.io import load_config, to_yaml
from latentdiff.models.components import load_vae
from latentdiff.training.distributed import start_accelerator
from latentdiff.training.inputs.encode import cache_latents
from latentdiff.training.inputs.sources import read_data

SCRIPT = Path(__file__).parents[2] / "scripts" / "cache_latents.py"
DATA = {"resolution": 32, "buckets": True, "bucket_multiple": 8, "num_crops": 2}


@pytest.fixture
def world(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    write_three_shapes(tmp_path / "data")
    make_vae().save_pretrained(tmp_path / "vae")
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS | {"data": DATA}))
    return tmp_path


def run(monkeypatch, capsys, *args: str) -> tuple[int, list[str], str]:
    """Run the script in this process: exit code, lines of stdout, stderr."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, args)])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    out, err = capsys.readouterr()
    return exit_.value.code, out.splitlines(), err


def options(world: Path, **overrides: object) -> list[str]:
    return [f"--config={world / 'config.json'}", *arguments(world, world / "run", **overrides)]


def shards(world: Path, kind: str = "latents") -> set[Path]:
    return set((world / "cache" / kind).glob("*.safetensors"))


def test_build_encodes_once_and_only_what_changed(world, monkeypatch, capsys):
    assert run(monkeypatch, capsys, *options(world))[:2] == (
        0,
        ["11 training images, 14 encoded now", "3 held-out images, 3 encoded now"],
    )
    again = ["11 training images, 0 encoded now", "3 held-out images, 0 encoded now"]
    other_rate = options(world, train__learning_rate=0.5, train__seed=7)
    assert run(monkeypatch, capsys, "build", *other_rate)[:2] == (0, again)
    weights = world / "vae" / "diffusion_pytorch_model.safetensors"
    changed = load_file(weights)
    next(iter(changed.values())).view(-1)[0] += 1e-3
    save_file(changed, weights, metadata={"format": "pt"})
    assert run(monkeypatch, capsys, *options(world))[1][1] == "3 held-out images, 3 encoded now"


def test_a_frozen_towers_captions_are_built_too(world, sd_folder, monkeypatch, capsys):
    settings = {"model__vae": "", "model__pretrained": sd_folder, "data__trigger_word": "sks"}
    lines = run(monkeypatch, capsys, *options(world, **settings))[1]
    assert lines[-1] == "15 captions, 15 encoded now"
    assert run(monkeypatch, capsys, *options(world, **settings))[1][-1].endswith(" 0 encoded now")
    shuffled = options(world, **settings, data__shuffle_tags="true")
    assert len(run(monkeypatch, capsys, *shuffled)[1]) == 2, "their embeddings cannot be cached"
    lines = run(monkeypatch, capsys, "prune", *options(world, **settings))[1]
    assert lines == ["all files are in use"]


def test_verify_says_what_is_missing_and_what_is_not_as_kept(world, monkeypatch, capsys):
    code, lines, _ = run(monkeypatch, capsys, "verify", *options(world))
    assert code == 0
    assert "11 training images: 14 not encoded yet; none to verify" in lines[0]
    assert not shards(world), "nothing is written"
    run(monkeypatch, capsys, *options(world))
    code, lines, _ = run(monkeypatch, capsys, "verify", *options(world))
    assert (code, len(lines)) == (0, 2)
    assert all(line.endswith("as kept") and ": 0 not encoded" in line for line in lines)
    assert "11 encoded again differ by" in lines[0]

    def ones(codec, pixels, *, dtype):
        return torch.ones(1, 2, 4, pixels.shape[1] // 4, pixels.shape[2] // 4)

    monkeypatch.setattr("latentdiff.data.cache.latent_cache.encode_moments", ones)
    code, lines, _ = run(monkeypatch, capsys, "verify", *options(world))
    assert code == 1
    assert "NOT AS KEPT" in lines[0]


def test_prune_lists_and_removes_only_when_told_to(world, monkeypatch, capsys):
    smaller = {"data__resolution": 24}
    run(monkeypatch, capsys, *options(world, **smaller))
    old = shards(world)
    run(monkeypatch, capsys, *options(world))
    kept = shards(world) - old
    assert old
    assert kept
    code, lines, _ = run(monkeypatch, capsys, "prune", *options(world))
    assert code == 0
    assert {Path(line.split("  ")[0]) for line in lines[:-1]} == {path.resolve() for path in old}
    assert lines[-1].startswith(f"{len(old)} files, ")
    assert lines[-1].endswith("not in use; --delete removes them")
    assert shards(world) == old | kept
    other = world / "other.yaml"
    other.write_text(to_yaml(load_config(world / "config.json", options(world, **smaller)[1:])))
    also = ["prune", *options(world), "--also", other, "--delete"]
    assert run(monkeypatch, capsys, *also)[1] == ["all files are in use"]
    lines = run(monkeypatch, capsys, "prune", *options(world), "--delete")[1]
    assert lines[-1].endswith(": removed")
    assert shards(world) == kept


def test_bad_input_is_one_message(world, monkeypatch, capsys):
    for args, message in (
        (["verify", *options(world, data__cache="false")], "data.cache=false keeps no latents"),
        (options(world, data__root="/no/such"), "/no/such"),
        (options(world, data__resolution=30), "data.bucket_multiple"),
        (["prune", *options(world), "--also", "nowhere.yaml"], "nowhere.yaml"),
    ):
        code, _, err = run(monkeypatch, capsys, *args)
        assert code == 2
        assert message in err
        assert "Traceback" not in err


def test_the_flowers_are_encoded_once_then_three_then_all(shared_dir, tmp_path):
    """Nine hundred photographs: none twice, three whose bytes changed, all for other weights."""
    source = shared_dir / "data" / "flowers"
    if not source.is_dir():
        pytest.skip(f"needs {source}")
    for path in (source / "train").iterdir():  # copied by hand: what is shared is read-only
        copy = tmp_path / "data" / "train" / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    make_vae().save_pretrained(tmp_path / "vae")
    (tmp_path / "config.json").write_text("data: {resolution: 16, heldout_fraction: 0}")

    def num_encoded(vae: Path, **overrides: object) -> int:
        given = arguments(tmp_path, tmp_path / "run", model__vae=vae, **overrides)
        config = load_config(tmp_path / "config.json", given)
        folder, _ = read_data(config.data)
        cache = cache_latents(folder, load_vae(vae), config.data, accelerator=accelerator)
        assert len(cache) == 900
        assert cache.num_missing == 0
        return cache.num_encoded

    accelerator = start_accelerator(load_config(tmp_path / "config.json"))
    assert num_encoded(tmp_path / "vae") == 900
    assert num_encoded(tmp_path / "vae") == 0
    assert num_encoded(tmp_path / "vae", train__learning_rate=0.5) == 0
    for path in sorted((tmp_path / "data" / "train").glob("*.jpg"))[::300]:
        path.write_bytes(path.read_bytes() + b"\0")
    assert num_encoded(tmp_path / "vae") == 3
    vae = make_vae()
    vae.load_state_dict(load_vae(tmp_path / "vae").state_dict())
    with torch.no_grad():
        next(iter(vae.parameters())).view(-1)[0] += 1e-3
    vae.save_pretrained(tmp_path / "other")
    assert num_encoded(tmp_path / "other") == 900
