"""LoRA files of many programs: each layer at its own strength, or refused by name."""

import json

import pytest
import torch
from fakes_lora import (
    ATTENTION,
    CONVS,
    TEXT,
    evenly,
    kohya_file,
    merge_by_hand,
    merged_outputs,
    outputs,
)
from fakes_pipeline import lora_weights, tiny_components, tiny_pipeline
from safetensors.torch import save_file

from latentdiff.pipeline.files.ldm_names import unet_name

MIXED_ALPHAS = {path: (4, a) for path, a in zip(ATTENTION, (4.0,) * 5 + (1.0,) * 3, strict=True)}
RANKS = (4, 4, 4, 8, 8, 2, 2, 6)
MIXED_RANKS = {path: (r, float(r)) for path, r in zip(ATTENTION, RANKS, strict=True)}
BLOCKS = {path: (4, 4.0 if path.startswith("down") else 0.5) for path in [*ATTENTION, *CONVS]}


@pytest.mark.parametrize(
    "strengths",
    [
        pytest.param(evenly(ATTENTION), id="uniform"),
        pytest.param(MIXED_ALPHAS, id="mixed alphas"),
        pytest.param(MIXED_RANKS, id="mixed ranks"),
        pytest.param(MIXED_RANKS | evenly(TEXT, rank=3, alpha=1.0), id="ranks and text encoder"),
        pytest.param(BLOCKS, id="block-wise"),
        pytest.param(evenly(ATTENTION) | evenly(CONVS, rank=2, alpha=3.0), id="convolutions"),
        pytest.param(evenly(TEXT, alpha=1.0) | {TEXT[0]: (2, 6.0)}, id="text encoder alone"),
        pytest.param(evenly(ATTENTION, alpha=None), id="no alpha"),
        pytest.param(MIXED_RANKS | evenly(ATTENTION[:3], alpha=None), id="some without alpha"),
        pytest.param(evenly(ATTENTION[:3]) | evenly(TEXT[:2]), id="no out_proj"),
    ],
)
def test_each_layer_acts_at_its_own_alpha_over_rank(strengths, tmp_path):
    pipe = tiny_pipeline()
    weights = kohya_file(pipe, strengths)
    save_file(weights, tmp_path / "style.safetensors")
    plain = outputs(pipe)
    pipe.load_lora_weights(tmp_path / "style.safetensors")
    found, expected = outputs(pipe), merged_outputs(strengths, weights)
    assert (expected - plain).abs().max() > 0.01
    assert (found - expected).abs().max() < 1e-4


def test_a_lora_with_settings_of_peft_acts_at_their_strength(tmp_path):
    weights = lora_weights()
    strong = {key: t * (3 if ".lora_B." in key else 1) for key, t in weights.items()}
    expected = tiny_pipeline()
    expected.load_lora_weights(strong)
    settings = {"r": 2, "lora_alpha": 6, "alpha_pattern": {}, "use_rslora": False}
    diffusers = tmp_path / "lora.safetensors"
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in settings.items()})}
    save_file(weights, diffusers, metadata=metadata)
    peft = tmp_path / "peft"
    peft.mkdir()
    bare = {f"base_model.model.{k.removeprefix('unet.')}": t for k, t in weights.items()}
    save_file(bare, peft / "adapter_model.safetensors")
    (peft / "adapter_config.json").write_text(json.dumps(settings | {"peft_type": "LORA"}))
    for path in (diffusers, peft):
        pipe = tiny_pipeline()
        pipe.load_lora_weights(path)
        assert torch.equal(outputs(pipe), outputs(expected))


@pytest.mark.parametrize("naming", ["peft", "bare", "processor", "compvis", "linear_layer"])
def test_names_of_other_programs_mean_the_same_layers(naming):
    pipe = tiny_pipeline()
    layers = [*ATTENTION, *CONVS] if naming in ("peft", "bare", "compvis") else ATTENTION
    if naming == "linear_layer":
        layers = TEXT
    weights = kohya_file(pipe, evenly(layers, alpha=None))
    expected = merged_outputs(evenly(layers, alpha=None), weights)
    renamed = {}
    for path in layers:
        flat = ("lora_te_text_model_" if layers is TEXT else "lora_unet_") + path.replace(".", "_")
        compvis = "" if layers is TEXT else unet_name(f"{path}.w", pipe.unet.config)[:-2]
        compvis = "lora_unet_" + compvis.replace(".", "_")
        peft = f"base_model.model.{path}"
        old = f"unet.{path}_lora".replace(".to_", ".processor.to_").replace("out.0", "out")
        down, up = {
            "peft": (f"{peft}.lora_A.weight", f"{peft}.lora_B.weight"),
            "bare": (f"{path}.lora_A.default.weight", f"{path}.lora_B.default.weight"),
            "compvis": (f"{compvis}.lora_down.weight", f"{compvis}.lora_up.weight"),
            "processor": (f"{old}.down.weight", f"{old}.up.weight"),
            "linear_layer": (
                f"text_encoder.text_model.{path}.lora_linear_layer.down.weight",
                f"text_encoder.text_model.{path}.lora_linear_layer.up.weight",
            ),
        }[naming]
        renamed[down] = weights[f"{flat}.lora_down.weight"]
        renamed[up] = weights[f"{flat}.lora_up.weight"]
    pipe.load_lora_weights(renamed)
    assert (outputs(pipe) - expected).abs().max() < 1e-4


def test_a_convolution_in_three_parts_acts_as_their_product():
    pipe = tiny_pipeline()
    layer = pipe.unet.get_submodule(CONVS[0])
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(3, 8, 1, 1, generator=generator) * 0.3
    mid = torch.randn(3, 3, 3, 3, generator=generator) * 0.3
    up = torch.randn(8, 3, 1, 1, generator=generator) * 0.3
    name = "lora_unet_" + CONVS[0].replace(".", "_")
    pipe.load_lora_weights(
        {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_mid.weight": mid,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(1.5),
        }
    )
    x = torch.randn(2, 8, 8, 8, generator=generator)
    conv = torch.nn.functional.conv2d
    parts = conv(conv(conv(x, down), mid, padding=1), up) * 0.5
    with torch.no_grad():
        found = pipe.unet.get_submodule(CONVS[0])(x)
        expected = conv(x, layer.weight, layer.bias, padding=1) + parts
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("layers", [ATTENTION, CONVS, TEXT])
def test_dora_in_kohyas_naming_sets_each_outputs_norm(layers):
    pipe, expected = tiny_pipeline(), tiny_pipeline()
    strengths = evenly(layers, alpha=1.0)
    weights = kohya_file(pipe, strengths)
    merge_by_hand(expected, strengths, weights)
    is_text = layers is TEXT
    for path in layers:
        layer = (expected.text_encoder if is_text else expected.unet).get_submodule(path)
        norm = layer.weight.data.flatten(1).norm(dim=1)
        wanted = 3 * norm + torch.rand(len(norm), generator=torch.Generator().manual_seed(1))
        ones = [1] * (layer.weight.ndim - 1)
        layer.weight.data *= (wanted / norm).reshape(-1, *ones)
        flat = ("lora_te_text_model_" if is_text else "lora_unet_") + path.replace(".", "_")
        weights[f"{flat}.dora_scale"] = wanted.reshape(-1, *ones)
    pipe.load_lora_weights(weights)
    assert (outputs(pipe) - outputs(expected)).abs().max() < 1e-3
    pipe.fuse_lora()
    assert (outputs(pipe) - outputs(expected)).abs().max() < 1e-3


def test_dora_of_inputs_or_of_some_layers_is_refused():
    pipe = tiny_pipeline()
    weights = kohya_file(pipe, evenly(ATTENTION))
    flat = "lora_unet_" + ATTENTION[0].replace(".", "_")
    with pytest.raises(ValueError, match="scales of the inputs"):
        pipe.load_lora_weights(weights | {f"{flat}.dora_scale": torch.ones(1, 8)})
    with pytest.raises(ValueError, match="1 of its 8 layers"):
        pipe.load_lora_weights(weights | {f"{flat}.dora_scale": torch.ones(8, 1)})
    assert not pipe.get_list_adapters()


def test_a_second_lora_adds_to_the_first():
    pipe, expected = tiny_pipeline(), tiny_pipeline()
    first, second = evenly(ATTENTION), evenly([*CONVS, *ATTENTION[:2], *TEXT], rank=2, alpha=1.0)
    for seed, strengths in enumerate((first, second)):
        weights = kohya_file(tiny_pipeline(), strengths, seed=seed)
        pipe.load_lora_weights(weights)
        merge_by_hand(expected, strengths, weights)
    assert (outputs(pipe) - outputs(expected)).abs().max() < 1e-4
    assert {name for one in pipe.get_list_adapters().values() for name in one} == {
        "default_0",
        "default_1",
    }


def test_a_second_lora_leaves_the_weight_of_the_first():
    pipe, expected = tiny_pipeline(), tiny_pipeline()
    first, second = (kohya_file(pipe, evenly(ATTENTION), seed=seed) for seed in (0, 1))
    pipe.load_lora_weights(first, "one")
    pipe.set_adapters(["one"], [0.25])
    pipe.load_lora_weights(second, "two")
    merge_by_hand(expected, evenly(ATTENTION, alpha=0.5), first)
    merge_by_hand(expected, evenly(ATTENTION), second)
    assert (outputs(pipe) - outputs(expected)).abs().max() < 1e-4
    with pytest.raises(ValueError, match="adapter_name='two'"):
        pipe.load_lora_weights(second, "two")


def test_loras_keep_the_models_dtype_and_fit_half_precision():
    pipe = tiny_pipeline().to(torch.bfloat16)
    pipe.load_lora_weights(kohya_file(tiny_pipeline(), MIXED_RANKS))
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.bfloat16}


REFUSED = {
    "hada_w1_a": "LoHa",
    "lokr_t2": "LoKr in Tucker form",
    "oft_blocks": "OFT",
    "on_input": r"\(IA\)3",
    "diff": "whole weights",
}


@pytest.mark.parametrize("matrix", REFUSED)
def test_other_adapters_of_lycoris_are_named(matrix, tmp_path):
    path = tmp_path / "style.safetensors"
    save_file({f"lora_unet_mid_block_attentions_0_proj_in.{matrix}": torch.ones(2, 2)}, path)
    with pytest.raises(ValueError, match=rf"style\.safetensors holds {REFUSED[matrix]}") as failure:
        tiny_pipeline().load_lora_weights(path)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("key", "family"),
    [
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_{}.weight", "Stable Diffusion XL"),
        (
            "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q.lora_{}.weight",
            "Diffusion XL",
        ),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_{}.weight", "Flux"),
        ("lora_unet_double_blocks_0_img_attn_proj.lora_{}.weight", "Flux"),
        ("lora_unet_joint_blocks_0_x_block_attn_proj.lora_{}.weight", "Stable Diffusion 3"),
        ("diffusion_model.blocks.0.cross_attn.k.lora_{}.weight", "a diffusion transformer"),
    ],
)
def test_a_lora_of_another_family_is_named_as_such(key, family):
    names = ("A", "B") if "transformer." in key or ".blocks." in key else ("down", "up")
    weights = {key.format(names[0]): torch.ones(2, 640), key.format(names[1]): torch.ones(640, 2)}
    with pytest.raises(ValueError, match=f"the LoRA was trained for .*{family}"):
        tiny_pipeline().load_lora_weights(weights)


def two_matrices(layer, down):
    return {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": torch.ones(8, 2)}


def test_a_lora_of_another_width_names_its_family():
    flat = "lora_unet_" + f"{ATTENTION[4]}".replace(".", "_")
    weights = {
        f"{flat}.lora_down.weight": torch.ones(2, 2048),
        f"{flat}.lora_up.weight": torch.ones(8, 2),
    }
    with pytest.raises(ValueError, match=r"\(2, 2048\), expected \(2, 16\).*Stable Diffusion XL"):
        tiny_pipeline().load_lora_weights(weights)


def test_layers_without_a_place_are_counted(caplog):
    pipe = tiny_pipeline()
    weights = kohya_file(pipe, evenly(ATTENTION))
    extra = "lora_unet_down_blocks_3_attentions_0_proj_in"
    weights |= {
        f"{extra}.lora_down.weight": torch.ones(2, 8),
        f"{extra}.lora_up.weight": torch.ones(8, 2),
    }
    pipe.load_lora_weights(weights)
    assert "1 of the LoRA's 9 layers have no place" in caplog.text


@pytest.mark.parametrize("length", [0, 7, 40, 300, -8])
def test_a_damaged_file_is_named_with_the_reason(length, tmp_path):
    path = tmp_path / "style.safetensors"
    save_file(kohya_file(tiny_pipeline(), evenly(ATTENTION)), path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"style\.safetensors is not a whole safetensors file"):
        tiny_pipeline().load_lora_weights(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>Not found", "web page"),
        (b"PK\x03\x04" + bytes(80), "pickle"),
        (b"GGUF" + bytes(80), "GGUF"),
    ],
)
def test_a_file_of_another_format_is_named(content, reason, tmp_path):
    (tmp_path / "style.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=rf"style\.safetensors .*{reason}"):
        tiny_pipeline().load_lora_weights(tmp_path / "style.safetensors")


@pytest.mark.parametrize(
    "name", ["x.bin", "x.BIN", "x.Pt", "x.ckpt", "x.txt", "x", "x.safetensors.pt"]
)
def test_only_safetensors_are_opened_whatever_the_name(name, tmp_path, monkeypatch):
    def never(*args, **options):
        raise AssertionError("torch.load")

    torch.save({"<pet>": torch.zeros(16)}, tmp_path / name)
    monkeypatch.setattr(torch, "load", never)
    pipe = tiny_pipeline()
    for load in (pipe.load_lora_weights, pipe.load_textual_inversion, pipe.lora_state_dict):
        with pytest.raises(ValueError, match=r"pickle|is no \.safetensors file"):
            load(tmp_path, weight_name=name)
        with pytest.raises(ValueError, match=r"pickle|is no \.safetensors file"):
            load(str(tmp_path / name))
        with pytest.raises(ValueError, match=r"pickle|is no \.safetensors file"):
            load("someone/else", weight_name=name)


def test_a_missing_path_is_said_to_be_missing(tmp_path):
    for path in (tmp_path / "stlye.safetensors", "stlye.safetensors", "runs/a/lora", "stlye"):
        with pytest.raises(FileNotFoundError, match=r"there is no file or folder .*(stlye|runs)"):
            tiny_pipeline().load_lora_weights(path)
    with pytest.raises(FileNotFoundError, match=r"holds no x\.safetensors"):
        tiny_pipeline().load_lora_weights(tmp_path, weight_name="x.safetensors")


def test_a_folder_of_several_asks_which(tmp_path):
    weights = kohya_file(tiny_pipeline(), evenly(ATTENTION))
    save_file(weights, tmp_path / "one.safetensors")
    tiny_pipeline().load_lora_weights(tmp_path)
    save_file(weights, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"one\.safetensors, two\.safetensors: choose one"):
        tiny_pipeline().load_lora_weights(tmp_path)
    tiny_pipeline().load_lora_weights(tmp_path, weight_name="two.safetensors")


def test_other_kinds_of_files_are_told_apart(tmp_path):
    save_file({"emb_params": torch.zeros(1, 16)}, tmp_path / "word.safetensors")
    with pytest.raises(ValueError, match=r"an embedding.*load_textual_inversion"):
        tiny_pipeline().load_lora_weights(tmp_path / "word.safetensors")
    save_file(lora_weights(), tmp_path / "style.safetensors")
    with pytest.raises(ValueError, match=r"a LoRA.*load_lora_weights"):
        tiny_pipeline().load_textual_inversion(tmp_path / "style.safetensors")
    unet = tiny_components()["unet"]
    save_file(unet.state_dict(), tmp_path / "unet.safetensors")
    with pytest.raises(ValueError, match="a U-Net alone"):
        tiny_pipeline().load_lora_weights(tmp_path / "unet.safetensors")


def test_non_finite_matrices_are_refused_before_anything_changes():
    pipe = tiny_pipeline()
    plain = outputs(pipe)
    weights = kohya_file(pipe, evenly([*ATTENTION, *TEXT]))
    weights[next(k for k in weights if "lora_te" in k)][0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        pipe.load_lora_weights(weights)
    assert not pipe.get_list_adapters()
    assert torch.equal(outputs(pipe), plain)


def lokr_of(weight: torch.Tensor, *, rank: int | None) -> dict[str, torch.Tensor]:
    """Return factors of a LoKr for a layer, w2 as a product of a rank or whole."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = len(weight) // 2, weight.shape[1] // 4
    kernel = weight.shape[2:]
    factors = {"lokr_w1": torch.randn(2, 4, generator=generator) * 0.3}
    if rank is None:
        whole = torch.randn(rows, columns, *kernel, generator=generator)
        return factors | {"lokr_w2": whole, "alpha": torch.tensor(7.0)}
    b = torch.randn(rank, columns * kernel.numel(), generator=generator)
    a = torch.randn(rows, rank, generator=generator) * 0.3
    return factors | {"lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(1.0)}


@pytest.mark.parametrize("rank", [2, 40, None])
def test_lokr_acts_as_its_kronecker_product(rank):
    """And a whole w2 is not scaled by alpha, as in LyCORIS."""
    pipe, merged, weights = tiny_pipeline(), tiny_pipeline(), {}
    for path in (ATTENTION[0], CONVS[0]):
        weight = merged.unet.get_submodule(path).weight
        factors = lokr_of(weight, rank=rank)
        w1, scale = factors["lokr_w1"], 1.0
        if rank is None:
            w2 = factors["lokr_w2"].flatten(1)
        else:
            w2, scale = factors["lokr_w2_a"] @ factors["lokr_w2_b"], 1 / rank
        weight.data += scale * torch.kron(w1, w2).view(weight.shape)
        name = "lora_unet_" + path.replace(".", "_")
        weights |= {f"{name}.{key}": factor for key, factor in factors.items()}
    pipe.load_lora_weights(weights)
    torch.testing.assert_close(outputs(pipe), outputs(merged), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lokr_w2_b": None}, "alone, expected"),
        ({"lokr_w2_b": torch.ones(3, 4)}, "do not fit"),
        ({"lokr_w1": torch.ones(3, 3)}, "expected"),
        ({"lokr_w1": torch.tensor(1.0)}, "do not fit"),
        ({"lora_up.weight": torch.ones(2, 2)}, "alone, expected"),
    ],
)
def test_lokr_that_does_not_fit_is_refused(change, said):
    pipe = tiny_pipeline()
    factors = lokr_of(pipe.unet.get_submodule(ATTENTION[0]).weight, rank=2) | change
    name = "lora_unet_" + ATTENTION[0].replace(".", "_")
    weights = {f"{name}.{key}": value for key, value in factors.items() if value is not None}
    with pytest.raises(ValueError, match=said):
        pipe.load_lora_weights(weights)
