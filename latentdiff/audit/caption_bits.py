"""What each caption of a folder is worth to a model in bits, and which words carry it.

A caption's value is the variational bound of its image without a caption less the bound with it
(Ho et al. 2020, Eq. 5), on the same timesteps and noise: an estimate of the pointwise mutual
information of image and caption (Kong et al. 2023, "Information-theoretic diffusion"). Negative:
the caption misleads the model. Does not answer for: what a user sees of it (caption_report.py).
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from latentdiff.config.options import CaptionAuditOptions
from latentdiff.config.validation import check_ranges
from latentdiff.data.captions import CaptionTransform
from latentdiff.diffusion.bound import BoundSamples, TimestepPlan, difference
from latentdiff.evaluation.eval_set import EvalModel, audit_options, encode_captions, open_denoiser
from latentdiff.evaluation.metrics.bootstrap import Interval
from latentdiff.evaluation.metrics.vlb import Chain, bound_samples, caption_bound
from latentdiff.models.conditioning import Conditioning

Verdict = Literal["wrong", "says nothing", "identity leak", "fine"]
LEVEL = 0.95  # of each caption's interval
KEPT_SHARE = 0.25  # of a caption's bits: more than this without the trigger word is a leak
NUM_PILOT, PILOT_STEPS, UNIFORM_SHARE = 8, 50, 0.2
MAX_REPAIRED, MAX_CANDIDATES = 24, 16  # wrong captions with a suggestion, and captions tried
MAX_WORDS, MAX_WORD_IMAGES = 12, 32
NO_SUBJECT = {  # words that name none, without which a caption is no language
    *("a", "an", "the", "of", "in", "on", "at", "with", "and", "or", "to", "is"),
    *("photo", "photograph", "picture", "image", "drawing"),
}


@dataclass(frozen=True)
class CaptionValue:
    """A caption, its value in bits with the interval over draws, and what is wrong with it.

    without_trigger: its value once the trigger word is taken out; suggestion: a repair, or "".
    """

    id: str
    caption: str
    bits: Interval
    se: float
    verdict: Verdict
    without_trigger: Interval | None = None
    suggestion: str = ""


@dataclass(frozen=True)
class CaptionAudit:
    """The values of all captions, and of the words that carry a subject besides its trigger word.

    words: how many bits a caption without the trigger word loses with each, the largest first.
    """

    model: EvalModel
    captions: Sequence[CaptionValue]
    words: Sequence[tuple[str, Interval]] = field(default_factory=tuple)

    def of(self, verdict: Verdict) -> list[CaptionValue]:
        """Return the captions of a verdict, those worth the least first; of leaks the most."""
        found = [one for one in self.captions if one.verdict == verdict]
        return sorted(found, key=lambda one: one.bits.estimate, reverse=verdict == "identity leak")


class CaptionMeter:
    """Measures captions of a model's images, on the same timesteps and noise each time."""

    def __init__(self, eval_model: EvalModel, *, draws: int, repeats: int) -> None:
        self.eval_model, self.repeats = eval_model, repeats
        self.chain = Chain.of(eval_model.components)
        self.plan = _plan(eval_model, num_timesteps=self.chain.schedule.num_timesteps, draws=draws)
        self._null: dict[tuple[int, ...], BoundSamples] = {}

    def bits(self, captions: Sequence[str], indices: Sequence[int]) -> Tensor:
        """Return what a caption for each of n images is worth, (n, repeats) float64, in bits."""
        chosen = self.eval_model.latents.select(indices)
        key = tuple(indices)
        if key not in self._null:
            self._null = {key: self._bound(chosen.z0, chosen.null_conditioning)}
        size = self.eval_model.size
        given = encode_captions(self.eval_model.components, captions, size=size)
        found = difference(self._null[key], self._bound(chosen.z0, given))
        if not found.isfinite().all():
            raise FloatingPointError("the model's output became NaN or Inf; is it damaged?")
        return found * chosen.z0[0].numel()

    def _bound(self, z0: Tensor, conditioning: Conditioning) -> BoundSamples:
        return bound_samples(
            self.chain,
            z0,
            conditioning,
            plan=self.plan,
            repeats=self.repeats,
            batch_size=self.eval_model.batch_size,
            seed=self.eval_model.seed,
        )


def _plan(eval_model: EvalModel, *, num_timesteps: int, draws: int) -> TimestepPlan | None:
    """Return how timesteps are drawn: where captions make a difference, by a few images' chains.

    None takes all T steps, where the chain is not longer than the draws.
    """
    if num_timesteps - 1 <= draws:
        return None
    latents, steps = eval_model.latents, min(PILOT_STEPS, num_timesteps)
    few = np.linspace(0, len(latents) - 1, min(NUM_PILOT, len(latents))).round().astype(int)
    pilot = caption_bound(
        Chain.of(eval_model.components, steps=str(steps)),
        latents.select(few.tolist()),
        plan=None,
        repeats=1,
        batch_size=eval_model.batch_size,
        seed=eval_model.seed,
    )
    gain = (pilot.unconditional.bits - pilot.conditional.bits).square().mean((0, 1)).sqrt()
    spread = np.interp(np.linspace(0, 1, num_timesteps - 1), np.linspace(0, 1, len(gain)), gain)
    share = torch.from_numpy(spread + 1e-12)
    share = share / share.sum() * (1 - UNIFORM_SHARE) + UNIFORM_SHARE / len(share)
    return TimestepPlan(share, draws)


def audit_captions(model: str, options: CaptionAuditOptions) -> CaptionAudit:
    """Measure every caption, and suggest repairs; nothing in the folder is changed.

    ValueError or OSError names what is wrong with the folder or the model, FloatingPointError
    tells of a damaged one.
    """
    check_ranges(options)
    eval_model = open_denoiser(model, audit_options(options, split=options.split))
    meter = CaptionMeter(eval_model, draws=options.draws, repeats=options.repeats)
    every = range(len(eval_model.latents))
    own = eval_model.latents.captions
    with_trigger = CaptionTransform(trigger_word=options.trigger_word)
    captions = [with_trigger.fixed(one) for one in own]
    bits = meter.bits(captions, every)
    without, words = None, list[tuple[str, Interval]]()
    if options.trigger_word:
        plain = [without_word(one, options.trigger_word) for one in captions]
        without = meter.bits(plain, every)
        words = _word_values(meter, plain)
    verdicts = [judge(row, None if without is None else without[i]) for i, row in enumerate(bits)]
    suggestions = _suggestions(meter, captions, verdicts=verdicts, bits=bits, words=words)
    values = [
        CaptionValue(
            record.id,
            captions[i],
            t_interval(bits[i]),
            float(bits[i].std() / len(bits[i]) ** 0.5),
            verdicts[i],
            None if without is None else t_interval(without[i]),
            suggestions.get(i, ""),
        )
        for i, record in enumerate(eval_model.folder)
    ]
    return CaptionAudit(eval_model, values, words)


def judge(bits: Tensor, without_trigger: Tensor | None = None) -> Verdict:
    """Return the verdict on a caption from the repeats (R,) of its value, paired with those
    without the trigger word.
    """
    value = t_interval(bits)
    if value.high < 0:
        return "wrong"
    if value.contains(0.0):
        return "says nothing"
    if without_trigger is not None and t_interval(without_trigger - KEPT_SHARE * bits).low > 0:
        return "identity leak"
    return "fine"


def t_interval(values: Tensor) -> Interval:
    """Return the mean of R >= 2 estimates and its interval by Student's t."""
    num = len(values)
    se = float(values.std()) / num**0.5
    half = float(stats.t.ppf((1 + LEVEL) / 2, num - 1)) * se
    mean = float(values.mean())
    return Interval(mean, mean - half, mean + half, LEVEL, num)


def without_word(caption: str, word: str) -> str:
    """Return a caption without a word or phrase, whatever its case, and without a tag it empties.

    "sks, a dog" without sks is "a dog", "a photo of sks dog" is "a photo of dog".
    """
    text = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", " ", caption, flags=re.IGNORECASE)
    tags = (" ".join(tag.split()) for tag in text.split(","))
    return ", ".join(tag for tag in tags if tag)


def _word_values(meter: CaptionMeter, captions: Sequence[str]) -> list[tuple[str, Interval]]:
    """Return how many bits each of the commonest words carries in captions without the trigger."""
    found = [re.findall(r"\w[\w'-]*", one.lower()) for one in captions]
    counts = Counter(word for words in found for word in {*words} - NO_SUBJECT)
    values = []
    for word, _ in counts.most_common(MAX_WORDS):
        rows = [i for i, words in enumerate(found) if word in words]
        spaced = np.linspace(0, len(rows) - 1, min(MAX_WORD_IMAGES, len(rows))).round().astype(int)
        rows = [rows[k] for k in spaced]
        texts = [captions[i] for i in rows]
        fewer = [without_word(text, word) for text in texts]
        lost = meter.bits(texts, rows) - meter.bits(fewer, rows)  # (n, R)
        values.append((word, t_interval(lost.mean(0))))
    return sorted(values, key=lambda one: -one[1].estimate)


def _suggestions(
    meter: CaptionMeter,
    captions: Sequence[str],
    *,
    verdicts: Sequence[Verdict],
    bits: Tensor,
    words: Sequence[tuple[str, Interval]],
) -> dict[int, str]:
    """Return a repair for captions that are not fine, by their index."""
    carriers = [word for word, lost in words if lost.low > 0][:3]
    leak = "leave out words that name the subject" + (
        f", such as {', '.join(carriers)}" if carriers else ""
    )
    texts = {
        "wrong": "check it against the image, and describe what is seen",
        "says nothing": "describe what sets this image apart, or drop words that it does not show",
        "identity leak": leak,
    }
    plain = {i: texts[one] for i, one in enumerate(verdicts) if one != "fine"}
    return plain | _better_captions(meter, captions, verdicts=verdicts, bits=bits)


def _better_captions(
    meter: CaptionMeter, captions: Sequence[str], *, verdicts: Sequence[Verdict], bits: Tensor
) -> dict[int, str]:
    """Try other wrong captions and the folder's commonest on the wrong ones; return the best."""
    wrong = [i for i in bits.mean(1).argsort().tolist() if verdicts[i] == "wrong"][:MAX_REPAIRED]
    if not wrong or not MAX_CANDIDATES:
        return {}
    common = [caption for caption, _ in Counter(captions).most_common(MAX_CANDIDATES)]
    half = MAX_CANDIDATES // 2
    others = [captions[i] for i in wrong]
    candidates = [*dict.fromkeys([*others[:half], *common, *others])][:MAX_CANDIDATES]
    tried = torch.stack([meter.bits([one] * len(wrong), wrong) for one in candidates])  # (K, n, R)
    found = {}
    for n, i in enumerate(wrong):
        best = int(tried[:, n].mean(1).argmax())
        value = t_interval(tried[best, n])
        if value.low > 0 and candidates[best] != captions[i]:
            found[i] = f'reads more like "{candidates[best]}" ({value.estimate:+.1f} bits)'
    return found
