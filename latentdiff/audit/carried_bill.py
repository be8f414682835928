"""The bill of an export that was made of another one: a single file, a pack, an average.

It says what the other was made of, under a root of its own that names the other's.
"""

import logging
from dataclasses import replace
from pathlib import Path

from latentdiff.atomic import write_text
from latentdiff.audit.stored_bill import StoredBill, read_bills
from latentdiff.models.model_path import resolve_model
from latentdiff.pipeline.files.model_info import CONTENT_NAME
from latentdiff.training.bill.contents import attach_to_file, attach_to_folder

logger = logging.getLogger(__name__)


def carry_bill(source: str, out: Path, *, artifact: str) -> str:
    """Write the bill of a model or file into what was made of it; return the root, "" without one.

    artifact: how it was made, one of MADE_OF. A model that is not that of its bill any more has
    none to pass on, of which a warning is logged, and so has one on the Hub that is not here.
    """
    try:
        stored = _bill_of(source, artifact)
    except (OSError, ValueError):  # without a bill, as others' models are
        return ""
    if stored is None:
        return ""
    if stored.found() != stored.bill.files:
        logger.warning("%s has no bill of materials: that of %s is of other files", out, source)
        return ""
    origin = {"artifact": stored.bill.artifact, "root": stored.bill.root}
    if out.is_file():
        bill = replace(stored.bill, made_from=origin)
        return attach_to_file(out, bill, artifact=artifact).root
    content = stored.place / CONTENT_NAME
    if content.is_file():
        write_text(out / CONTENT_NAME, content.read_text(encoding="utf-8"))
    return attach_to_folder(out, replace(stored.bill, made_from=origin), artifact=artifact).root


def _bill_of(source: str, artifact: str) -> StoredBill | None:
    """Return the bill of a model's folder, or of the LoRA of a run or folder."""
    path = Path(source).expanduser()
    if artifact != "converted_lora":
        return read_bills(str(resolve_model(source)))[0]
    found = read_bills(str(path))
    return next((one for one in found if one.is_lone_file or one.bill.artifact == "lora"), None)
