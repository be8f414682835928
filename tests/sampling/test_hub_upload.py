"""Uploads to the Hub, with a client that stands for it: what is sent, and what goes wrong."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from fakes_pipeline import lora_weights, tiny_pipeline
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from PIL import Image
from safetensors.torch import save_file

from latentdiff.cli.main import main
from latentdiff.pipeline.files.model_info import ModelInfo
from latentdiff.sampling import hub_upload
from latentdiff.sampling.hub_upload import plan_upload, send


class FakeHub:
    """Keeps what it is sent, or fails as the Hub does."""

    def __init__(self, error=None):
        self.error, self.repos, self.files = error, {}, {}

    def create_repo(self, repo_id, *, private, exist_ok):
        if self.error is not None:
            raise self.error
        self.repos[repo_id] = private
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id, operations, *, commit_message, create_pr):
        for add in operations:
            with add.as_file() as file:
                self.files[add.path_in_repo] = file.read()
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.fixture
def run(tmp_path):
    """The folder of a LoRA's run."""
    pipe = tiny_pipeline()
    pipe.model_info = ModelInfo(base_model="owner/base", steps=10, dataset="cats")
    pipe.save_pretrained(tmp_path / "run" / "pipeline")
    (tmp_path / "run" / "lora").mkdir()
    path = tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors"
    save_file(lora_weights(), path, metadata={"modelspec.trigger_phrase": "sks cat"})
    save_file(lora_weights(), tmp_path / "run" / "lora_kohya.safetensors")
    return tmp_path / "run"


def test_a_model_is_sent_in_one_commit_with_a_card_of_its_new_name(run):
    hub = FakeHub()
    upload = plan_upload(str(run), "me/cats")
    assert send(upload, private=True, hub=hub) == "https://hub/me/cats/commit/1"
    assert hub.repos == {"me/cats": True}
    folder = run / "pipeline"
    local = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert hub.files.keys() == local
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert hub.files[weights] == (folder / weights).read_bytes()
    card = ModelCard(hub.files["README.md"].decode())
    assert 'from_pretrained("me/cats")' in card.text
    assert card.data.base_model == "owner/base"
    (folder / "README.md").write_text("my own words")
    assert plan_upload(str(folder), "me/cats").card == "my own words"


def test_a_lora_is_sent_alone_with_its_trigger_words_and_an_image(run, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "sheet.png")
    hub = FakeHub()
    upload = plan_upload(str(run), "me/cats", part="lora", image=tmp_path / "sheet.png")
    send(upload, hub=hub)
    lora = "pytorch_lora_weights.safetensors"
    assert hub.files.keys() == {"README.md", lora, "lora_kohya.safetensors", "sample.png"}
    card = ModelCard(hub.files["README.md"].decode())
    assert card.data.to_dict()["instance_prompt"] == "sks cat"
    assert "lora" in card.data.tags
    assert 'load_lora_weights("me/cats")' in card.text
    assert 'pipe("sks cat")' in card.text
    assert "# me/cats\n\n![samples](sample.png)\n\nA LoRA for owner/base" in card.text
    file = plan_upload(str(run / "lora" / lora), "me/cats", part="lora")
    assert file.files.keys() == {lora}


def test_an_embedding_is_sent_under_the_name_that_diffusers_looks_for(tmp_path):
    save_file({"<toy>": lora_weights().popitem()[1]}, tmp_path / "learned_embeds.safetensors")
    upload = plan_upload(str(tmp_path), "me/toy", part="embedding")
    assert upload.files.keys() == {"learned_embeds.safetensors"}
    assert 'load_textual_inversion("me/toy")' in upload.card
    assert "\\<toy\\>" in upload.card


def test_a_dry_run_prints_files_and_card_and_asks_nothing_of_the_hub(run, capsys, monkeypatch):
    monkeypatch.setattr(hub_upload, "HfApi", None)
    assert main(["export", "push", str(run), "me/cats", "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "MB  unet/diffusion_pytorch_model.safetensors" in out
    assert "nothing is sent; README.md would be:\n\n---\n" in out


def refusal(status):
    request = SimpleNamespace(url="https://hub", headers={})
    response = SimpleNamespace(status_code=status, headers={}, request=request)
    return HfHubHTTPError(f"{status} Client Error", response=response)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (refusal(401), r"needs a token that may write to me \(401\).*hf auth login"),
        (refusal(403), r"needs a token that may write to me \(403\)"),
        (LocalTokenNotFoundError("no token"), "settings/tokens"),
        (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
        (refusal(500), "the upload to me/cats failed: 500 Client Error; the same command"),
        (HfHubHTTPError.__bases__[0]("no route\nto host"), "failed: no route; the same command"),
    ],
)
def test_what_goes_wrong_is_one_clear_message(error, message, run, capsys, monkeypatch):
    with pytest.raises(ValueError, match=message):
        send(plan_upload(str(run), "me/cats"), hub=FakeHub(error))
    monkeypatch.setattr(hub_upload, "HfApi", lambda: FakeHub(error))
    assert main(["export", "push", str(run), "me/cats"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_cannot_be_sent_is_refused_before_the_hub_is_asked(run, tmp_path):
    for source, repo_id, part, message in (
        (str(tmp_path / "absent"), "me/cats", "model", "no folder"),
        (str(run), "me//cats", "model", "me//cats"),
        (str(run), "me/cats", "embedding", "is no embedding, it holds a LoRA"),
        ("owner/base", "me/cats", "model", "only what is here is uploaded"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            plan_upload(source, repo_id, part=part)
    with pytest.raises(FileNotFoundError, match="no image"):
        plan_upload(str(run), "me/cats", image=tmp_path / "absent.png")
    config = run / "pipeline" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"from": "/home/me/secret/x"}))
    with pytest.raises(ValueError, match="names /home/me/secret/x"):
        plan_upload(str(run), "me/cats")
