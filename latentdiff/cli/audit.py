"""Commands that audit a model and its data: membership inference, captions in bits."""

from collections.abc import Sequence
from dataclasses import replace
from os.path import expanduser
from pathlib import Path

from jsonargparse import ArgumentParser

from latentdiff.cli.command import add_model, quieten_libraries, take_options
from latentdiff.config.options import CaptionAuditOptions, PrivacyOptions


def audit_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """Measure what a model betrays of its training images: membership inference, and copies.

    On fixed timesteps and noise, against held-out images of the same kind, and against canaries
    where the run planted them (data.num_canaries).
    """
    add_model(parser)
    parser.add_class_arguments(PrivacyOptions)
    values = parser.parse_args(arguments).as_dict()
    options = take_options(PrivacyOptions, values)
    options = replace(options, out=str(_folder(values["model"], options.out)))
    quieten_libraries("audit.privacy")
    from latentdiff.audit.privacy import audit_privacy
    from latentdiff.audit.privacy_report import add_to_card, summary_lines, write_privacy_receipt
    from latentdiff.models.model_path import resolve_model

    receipt = audit_privacy(values["model"], options)
    counts = {name: f"{len(folder):,}" for name, folder in receipt.folders.items()}
    facts = {
        "model": values["model"],
        "data": options.data,
        "held-out": options.heldout or "the held-out split of the data",
        "images": ", ".join(f"{count} {name}" for name, count in counts.items()),
        "base": options.base or "not given",
        "losses": f"{options.draws} timesteps an image, seed {options.seed}",
    }
    report = write_privacy_receipt(receipt, Path(options.out), facts=facts)
    print("\n".join(summary_lines(receipt)))
    if options.card:
        add_to_card(resolve_model(values["model"]) / "README.md", receipt)
    print(f"wrote {report.with_name('privacy.json')} and {report}", flush=True)
    return 0


def audit_captions_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """List captions that are probably wrong, say nothing, or carry a subject past its trigger word.

    Each is measured in bits by the model, on fixed timesteps and noise. Repairs are suggested,
    never applied.
    """
    add_model(parser)
    parser.add_class_arguments(CaptionAuditOptions)
    values = parser.parse_args(arguments).as_dict()
    options = take_options(CaptionAuditOptions, values)
    out = _folder(values["model"], options.out)
    quieten_libraries("audit.caption_bits")
    from latentdiff.audit.caption_bits import audit_captions
    from latentdiff.audit.caption_report import summary_lines, write_caption_audit

    audit = audit_captions(values["model"], options)
    facts = {
        "model": values["model"],
        "data": options.data,
        "captions": f"{len(audit.captions):,}",
        "trigger word": options.trigger_word or "none",
        "estimates": f"{options.repeats} of {options.draws} timesteps, seed {options.seed}",
    }
    report = write_caption_audit(audit, out, facts=facts)
    print("\n".join(summary_lines(audit)))
    print(f"wrote {report.with_name('captions.json')} and {report}", flush=True)
    return 0


def _folder(model: str, out: str) -> Path:
    """Return the folder for the results; ValueError where none is given and the model is no run."""
    if out:
        return Path(expanduser(out))
    from latentdiff.training.report.run_record import AUDIT, run_folder_of

    try:
        return run_folder_of(Path(expanduser(model))) / AUDIT
    except (ValueError, FileNotFoundError) as error:
        why = f"{model} is no run of training: give a folder for the results by --out"
        raise ValueError(why) from error
