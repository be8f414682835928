"""Train a run's twin: the same run, in which the loss of some images weighs 0.

Every draw of a run depends only on (seed, epoch, sample, place), so order, noise, timesteps and
captions of all images stay as they were. A step's loss stays a sum over all its images divided by
their number: those that are left count neither more nor less. What a twin does is what the images'
gradients did, and what followed from it.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from latentdiff.audit.rerun import check_one_run
from latentdiff.audit.stored_bill import read_bills
from latentdiff.audit.verify import Given, verify
from latentdiff.config.io import load_stored_config
from latentdiff.config.text_to_image import Config
from latentdiff.training.bill.base import BASES
from latentdiff.training.metrics_file import read_rows
from latentdiff.training.report.run_record import read_run
from latentdiff.training.run_folder import exports_of
from latentdiff.training.text_to_image.train_t2i import train

TWINS = "twins"  # folder of a run
MAX_NAMES = 5  # of changed images in a message

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TwinComparison:
    """A twin's losses next to those of its run.

    num_equal: log lines before the first whose loss differs; first_other: its step, None where all
    are equal. heldout: the last held-out losses of run and twin, None where one has none.
    """

    num_equal: int
    first_other: int | None
    heldout: tuple[float, float] | None

    def lines(self) -> Iterator[str]:
        """Yield a line for each figure."""
        if self.first_other is None:
            yield f"all {self.num_equal} logged losses are those of the run, bit for bit"
        else:
            equal = f"the {self.num_equal} before it are equal, bit for bit"
            yield f"the first logged loss that differs is that of step {self.first_other}; {equal}"
        if self.heldout is not None:
            own, twin = self.heldout
            yield f"held-out loss at the end: {twin:.5f}, of the run {own:.5f}"


def train_twin(run: Path, without: Sequence[str], out: Path) -> int:
    """Train a run's twin into `out`; return the exit status, as `train`.

    without: the images' names in the data folder; none gives the run again, bit for bit on the same
    kind of processor and threads. The same call continues a twin that was stopped. ValueError or
    FileNotFoundError where the run, its data or a name is not what a twin needs.
    """
    config = twin_config(run, without, out)
    check_materials(run, config)
    return train(config)


def read_config(run: Path) -> Config:
    """Return the settings of a text-to-image run; ValueError or FileNotFoundError for no such."""
    if not (run / "config.yaml").is_file():
        raise FileNotFoundError(f"{run} has no config.yaml, expected the folder of a training run")
    if (kind := read_run(run, run.name).kind) != "text-to-image":
        raise ValueError(f"{run} is a {kind} run, expected one of text-to-image training")
    config: Config = load_stored_config(run / "config.yaml", Config)
    return config


def twin_config(run: Path, without: Sequence[str], out: Path) -> Config:
    """Return the settings of a run's twin in the folder `out`."""
    if out.resolve() == run.resolve():
        raise ValueError(f"--out={out} is the run itself, expected another folder for its twin")
    config = read_config(run)
    names = dict.fromkeys((*config.data.zero_weight_images, *without))
    class_images = config.finetune.class_images_dir
    if config.finetune.class_prompt and not class_images:
        class_images = str(run / "class_images")  # those that the run made
    return replace(
        config,
        output_dir=str(out),
        data=replace(config.data, zero_weight_images=tuple(names)),
        finetune=replace(config.finetune, class_images_dir=class_images),
        train=replace(config.train, resume="auto"),
    )


def default_folder(run: Path, without: Sequence[str]) -> Path:
    """Return the folder of a run's twin where none is given, named by the images."""
    if len(without) == 1:
        return run / TWINS / f"without-{without[0].replace('/', '-')}"
    digest = hashlib.sha256("\n".join(sorted(without)).encode()).hexdigest()[:8]
    return run / TWINS / (f"without-{len(without)}-{digest}" if without else "again")


def check_materials(run: Path, config: Config) -> None:
    """Raise ValueError where data or base are not those of the run's bill of materials."""
    if not exports_of(run):
        logger.warning("%s has not come to its end, and has nothing to compare its twin with", run)
        return
    try:
        bill = read_bills(str(run))[0].bill
    except ValueError:
        logger.warning("%s has no bill of materials: its data may have changed since", run)
        return
    check_one_run(bill)
    bases = {role: getattr(getattr(config, part), name) for role, (part, name) in BASES.items()}
    given = Given(
        [source.root for source in config.data.each_source()],
        {role: bases[role] for role in bill.last.base},
    )
    for finding in verify(str(run), given).findings:
        if finding.answer == "differs" and finding.part.startswith(("data", "base")):
            raise ValueError(
                f"{finding.part} is not what {run} was trained on: "
                f"{'; '.join(finding.details[:MAX_NAMES])}; put it back, or a twin differs by it"
            )


def compare_losses(run: Path, twin: Path) -> TwinComparison:
    """Compare the logged losses of a run and its twin."""
    losses = [{r["step"]: r["loss"] for r in read_rows(one) if "loss" in r} for one in (run, twin)]
    steps = sorted(losses[0].keys() & losses[1].keys())
    others = [k for k, step in enumerate(steps) if losses[0][step] != losses[1][step]]
    ends = [
        [r["heldout_loss"] for r in read_rows(one) if "heldout_loss" in r] for one in (run, twin)
    ]
    return TwinComparison(
        others[0] if others else len(steps),
        steps[others[0]] if others else None,
        (ends[0][-1], ends[1][-1]) if all(ends) else None,
    )
