"""Settings of the captioned folder, or of several sources, and of how their images are read."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from latentdiff.config.choices import BillOfMaterials, Mask
from latentdiff.config.validation import (
    at_least,
    between,
    check_ranges,
    color,
    folder,
    non_empty_texts,
    share,
    share_below_1,
)

MissingCaption = Literal["skip", "empty", "file_name", "folder_name"]


@dataclass(frozen=True)
class DataSource:
    """One of several sources of images, and its caption rules; null: as data.* says for all."""

    root: str
    """the captioned folder or Hugging Face data set, as data.root"""
    repeats: int = at_least(1, default=1)
    """how often an epoch shows each image"""
    weight: float = at_least(0, default=0.0)
    """share of an epoch next to the weights of the other sources, instead of repeats; each image is
    shown at least once; 0: no weights"""
    caption_column: str | None = None
    """as data.caption_column"""
    file_column: str | None = None
    """as data.file_column"""
    caption_template: str | None = None
    """as data.caption_template"""
    missing_caption: MissingCaption | None = None
    """as data.missing_caption"""
    shuffle_tags: bool | None = None
    """as data.shuffle_tags"""
    keep_tags: int | None = None
    """as data.keep_tags"""
    tag_dropout: float | None = None
    """as data.tag_dropout"""
    trigger_word: str | None = None
    """as data.trigger_word"""
    caption_prefix: str | None = None
    """as data.caption_prefix"""
    caption_suffix: str | None = None
    """as data.caption_suffix"""

    def rules(self) -> dict[str, Any]:
        """Return the settings of data.* that stand for this source, by their names."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return {name: given[name] for name in given.keys() - {"repeats", "weight"}}


FROM_SCRATCH_PX = 512  # data.resolution of a new model whose config gives none


@dataclass(frozen=True)
class DataConfig:
    """The captioned folder and how its images are read."""

    root: str = ""
    """the captioned folder, which may hold train/ and test/ or validation/ folders; or the id of a
    Hugging Face data set, OWNER/NAME, with @REVISION, ,config=NAME and ,split=NAME after it"""
    sources: tuple[DataSource, ...] = ()
    """several folders instead of one, as in [{root: cats, repeats: 2}, {root: dogs}]; each may have
    repeats or a weight, and caption_column, file_column, caption_template, missing_caption,
    shuffle_tags, keep_tags, tag_dropout, trigger_word, caption_prefix, caption_suffix of its own"""
    resolution: int | None = between(8, 16384, default=None)
    """pixels of a square image; each is resized until it covers its size, then cropped; null: the
    size that model.pretrained was trained at, or 512 from scratch"""
    buckets: bool = False
    """cut each image to the size nearest to its own aspect ratio, among sizes of at most
    resolution x resolution pixels, instead of to the square"""
    bucket_multiple: int = at_least(1, default=64)
    """pixels that the sides of buckets are multiples of: the VAE's factor times the U-Net's"""
    bucket_max_aspect: float = at_least(1, default=2.0)
    """longer side over shorter side of the longest bucket"""
    partial_batches: Literal["keep", "fill"] = "keep"
    """the last batch of a bucket stays smaller, or shows some of its images again"""
    num_crops: int = at_least(0, default=1)
    """crops of an image, evenly spaced, one at random each time; all are cached; 1: the centre; 0:
    anywhere, which needs data.cache=false"""
    cache: bool = True
    """encode images once, ahead of training; false: read and encode them at every step"""
    caption_column: str = "text"
    """column of the metadata file that holds the caption, or a list of captions; of a Hugging Face
    data set without that column the one named as captions are, or the only one of texts"""
    file_column: str = "file_name"
    """column of the metadata file that holds the image's name, or of a parquet or arrow data set
    that holds the image itself (by default the one named image, or the only one of images)"""
    condition_column: str = "condition"
    """column of the metadata file that names an image's condition, or a list of several of which
    one is used at random each time; without it NAME.condition.png next to NAME.jpg is used"""
    inpaint_mask_column: str = "inpaint_mask"
    """column of the metadata file that names an image's inpainting mask, or a list of several;
    without it NAME.inpaint_mask.png next to NAME.jpg is used"""
    duplicate_rows: Literal["error", "captions"] = "error"
    """an image listed twice: an error, or one with several captions"""
    sidecar_lines: Literal["one", "captions"] = "one"
    """a text file next to an image is one caption, or has one a line"""
    caption_template: str = ""
    """such as "a photo of a {label}" where the folders' names are the only captions"""
    missing_caption: MissingCaption = "skip"
    """skip an image without a caption, or give it the empty caption, or the name of its file
    without ending or of its folder, underscores read as spaces"""
    repeat_folders: bool = False
    """show the images of a folder named as in 10_dog that many times in an epoch, as kohya's
    trainer does; the rest of the name is the folder's name for captions"""
    caption_choice: Literal["random", "first"] = "random"
    """the caption of an image with several: one at random each time, or the first"""
    wildcards: bool = False
    """replace {a|b} in a caption by one of the alternatives each time, before anything else"""
    shuffle_tags: bool = False
    """shuffle the comma-separated tags of a caption each time"""
    keep_tags: int = at_least(0, default=0)
    """tags at the start that are neither shuffled nor dropped"""
    tag_dropout: float = share_below_1(default=0.0)
    """share of the other tags that is dropped each time"""
    trigger_word: str = ""
    """a word that becomes the first tag of every caption that lacks it"""
    caption_prefix: str = ""
    """text before every caption, as it is"""
    caption_suffix: str = ""
    """text after every caption, as it is"""
    heldout_fraction: float = share(default=0.02)
    """share held out by a stable hash where no test/ or validation/ folder exists"""
    random_flip: bool = False
    """mirror half of the images, but none whose caption mentions sides or writing"""
    background: tuple[int, int, int] = color(default=(255, 255, 255))
    """RGB under transparent images"""
    mask: Mask = "none"
    """region of the loss: everywhere, where an image is opaque, or where NAME.mask.png or
    NAME-masklabel.png next to NAME.jpg is white; the mask is cropped as the image and averaged over
    each latent pixel"""
    min_size: int = at_least(1, default=32)
    """pixels of the shorter side below which an image is skipped"""
    max_aspect: float = at_least(1, default=4.0)
    """longer side over shorter side above which an image is skipped"""
    max_invalid_fraction: float = share(default=0.02)
    """share of unusable images above which training does not start"""
    follow_links: bool = False
    """read through links that leave the folder (Hugging Face caches are made of them)"""
    cache_dir: str = folder(default="~/.cache/latentdiff")
    """folder of cached latents, prompt embeddings and scans, addressed by content"""
    num_canaries: int = at_least(0, default=0)
    """images of random colours and captions that the run plants among its own, and as many that it
    never shows, in canaries/ and canary_twins/: latentdiff audit tells by them what the model
    remembers; 0: none"""
    zero_weight_images: tuple[str, ...] = non_empty_texts()
    """images whose loss weighs 0, by their names in the folder, such as [train/cat.png]: shown in
    the same order with the same noise, and not learned from; `latentdiff twin` sets them"""
    bill_of_materials: BillOfMaterials = "names"
    """write what the model was made of, for latentdiff verify: hashes of images, captions, base
    model and settings, next to the images' names and your prompts, or hashes in place of these;
    none: no such file"""
    num_workers: int = between(0, 1024, default=0)
    """processes that prepare batches while training"""

    @property
    def side_px(self) -> int:
        """Pixels of a square image; of a run, whose config names its resolution, just that."""
        return FROM_SCRATCH_PX if self.resolution is None else self.resolution

    def each_source(self) -> tuple["DataConfig", ...]:
        """Return the settings of each source, or these alone where there are none."""
        each = (replace(self, sources=(), **source.rules()) for source in self.sources)
        return tuple(each) or (self,)

    def check(self) -> None:
        """Raise ValueError for settings that exclude each other."""
        self._check_sources()
        if self.buckets and self.resolution and self.resolution % self.bucket_multiple:
            raise ValueError(
                f"data.resolution={self.resolution} is not a multiple of data.bucket_multiple="
                f"{self.bucket_multiple}; the bucket multiple is the VAE's factor times the "
                "U-Net's, or a multiple of it"
            )
        if self.cache and self.num_crops == 0:
            raise ValueError(
                "data.num_crops=0 crops anywhere each time, which cannot be cached: add "
                "--data.cache=false, or give a number of crops"
            )

    def _check_sources(self) -> None:
        if self.num_canaries and any(source.weight for source in self.sources):
            raise ValueError(
                f"data.num_canaries={self.num_canaries} and weights of data.sources exclude each "
                "other: give each source repeats instead"
            )
        if self.root and self.sources:
            raise ValueError(
                f"data.root={self.root} and data.sources exclude each other; give the folder as "
                "one of the sources, or leave out one of the two"
            )
        weights = [source.weight for source in self.sources]
        own = self.each_source()
        for number, source in enumerate(self.sources):
            check_ranges(own[number], f"data.sources[{number}].")
            if not source.root:
                raise ValueError(f"data.sources[{number}].root is empty, expected a folder")
            if any(weights) and not source.weight:
                raise ValueError(
                    f"data.sources[{number}] ({source.root}) has no weight and others have; give "
                    "each source a weight above 0, or none"
                )
            if source.weight and source.repeats != 1:
                raise ValueError(
                    f"data.sources[{number}] ({source.root}) has repeats={source.repeats} and "
                    f"weight={source.weight:g}; a weight decides how often its images come, so "
                    "leave out one of the two"
                )
