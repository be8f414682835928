"""Images that the teacher generates for the student to train on, where a folder has few of its own.

Captions of few images are soon learned by heart, and images of another kind than the teacher's
shift what it knows; its own have neither fault (Kim et al. 2024, EdgeFusion). They are an ordinary
captioned folder, each image of a seed of its own, and one that was stopped is completed.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from latentdiff.config.data import DataConfig
from latentdiff.config.options import SampleOptions
from latentdiff.config.text_to_image import Config
from latentdiff.sampling.sample import sample

logger = logging.getLogger(__name__)
FOLDER = "teacher_images"


def data_of_teacher(data: DataConfig, out: Path) -> DataConfig:
    """Return the settings of the folder of the teacher's images, below out.

    Its captions are what training would have made of the data's, so no caption setting is left.
    """
    return DataConfig(
        root=str(out / FOLDER),
        resolution=data.resolution,
        heldout_fraction=0.0,
        random_flip=data.random_flip,
        cache=data.cache,
        cache_dir=data.cache_dir,
        num_workers=data.num_workers,
    )


def generate_teacher_images(
    template: Config,
    captions: Sequence[str],
    *,
    num: int,
    num_steps: int,
    guidance_scale: float,
    batch_size: int,
) -> None:
    """Generate num images of the captions in turn into output_dir/teacher_images.

    Image k has the seed train.seed + k. What is there already is not generated again.
    """
    out = Path(template.output_dir).expanduser() / FOLDER
    side = template.data.resolution
    options = SampleOptions(
        out=str(out),
        num_inference_steps=num_steps,
        guidance_scale=guidance_scale,
        seed=template.train.seed,
        batch_size=batch_size,
        prompt_weighting=False,
        height=side,
        width=side,
    )
    prompts = [captions[k % len(captions)] for k in range(num)]
    logger.info("the teacher generates %s images in %s", f"{num:,}", out)
    for _ in sample(template.model.pretrained, prompts, options):
        pass
