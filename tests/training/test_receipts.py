"""What can be proved of a run stands on its page and in the web UI, where commands wrote it."""

import json
import shutil
from pathlib import Path

import pytest
from fakes_app import write_run
from fakes_bill import materials_of, origin

from latentdiff.app.run_view import fingerprint, run_html
from latentdiff.training.report.receipts import receipt_facts
from latentdiff.training.report.report import run_report_html
from latentdiff.training.report.run_record import read_run

__all__ = ["origin"]
PRIVACY = {
    name: {
        "auc": {"estimate": auc, "low": auc - 0.05, "high": auc + 0.04},
        "true_positives": {"estimate": 0.15, "low": 0.09, "high": 0.23},
        "false_positive_rate": 0.01,
    }
    for name, auc in (("members", 0.903), ("canaries", 0.951))
} | {"copies": {"copies": {"estimate": 0.0, "low": 0.0, "high": 0.138}}}
CAPTIONS = {
    "verdicts": {"wrong": 1, "identity leak": 0, "says nothing": 1, "fine": 6},
    "captions": [
        {"id": "a.png", "caption": "a <b>cat</b>", "verdict": "wrong", "bits": -9.0, "se": 2.0},
        {"id": "b.png", "caption": "thing", "verdict": "says nothing", "bits": 0.5, "se": 1.0},
        {"id": "c.png", "caption": "a red heart", "verdict": "fine", "bits": 30.0, "se": 2.0},
    ],
}


@pytest.fixture(scope="module")
def run(origin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a bill, and both audits."""
    folder = write_run(tmp_path_factory.mktemp("receipts") / "mine", {10: 0.5})
    shutil.copytree(origin / "model", folder / "pipeline")
    (folder / "audit").mkdir()
    for name, found in (("privacy", PRIVACY), ("captions", CAPTIONS)):
        (folder / "audit" / f"{name}.json").write_text(json.dumps(found))
    return folder


def test_the_page_of_a_run_has_its_bill_and_what_audits_found(run: Path, origin: Path) -> None:
    page = run_report_html([read_run(run, "mine")])
    root = materials_of(origin).attach_to_folder(run / "pipeline", artifact="pipeline")
    for text in (root, "What it was made of", "base: model", "Summary of training content"):
        assert text in page
    for text in ("0.903 [0.853, 0.943]", "canaries against their twins", "15.0% [9.0%, 23.0%]"):
        assert text in page
    assert page.index("a.png") < page.index("b.png")
    assert "a &lt;b&gt;cat&lt;/b&gt;" in page
    assert "a red heart" not in page


def test_the_web_ui_names_the_root_and_the_auc_of_a_run(run: Path) -> None:
    facts = dict(receipt_facts(run))
    html = run_html(run, "mine")
    assert facts["root of its bill of materials"] in html
    assert "AUC 0.903 [0.853, 0.943]" in html
    before = fingerprint(run)
    (run / "audit" / "other.json").write_text("{}")
    assert fingerprint(run) != before


def test_a_run_without_them_has_no_such_section(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {10: 0.5})
    page = run_report_html([read_run(folder, "run")])
    assert "What it was made of" not in page
    assert "Captions in bits" not in page
    assert dict(receipt_facts(folder)) == {}
    (folder / "pipeline").mkdir()
    (folder / "pipeline" / "bill_of_materials.json").write_text("damaged")
    assert "What it was made of" not in run_report_html([read_run(folder, "run")])
