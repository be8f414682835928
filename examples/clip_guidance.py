"""Guide the bundled model by a CLIP's score of a text (Dhariwal & Nichol 2021, Alg. 2, with CLIP).

python examples/clip_guidance.py CLIP --text "a red heart" --out clip_guidance.png

CLIP is the folder of a transformers CLIP model, such as latentdiff train-clip writes. The upper row
is sampled without the guide, the lower row with it, from the same noise; their mean CLIP scores are
printed. Fast only for a small CLIP: the gradient goes through it at every step.
"""

import json
from pathlib import Path

from jsonargparse import auto_cli

from latentdiff import LatentDiffPipeline
from latentdiff.evaluation.metric_nets import load_clip
from latentdiff.evaluation.metrics.clip import ClipGuide
from latentdiff.image_grid import draw_grid, to_pil


def main(
    clip: str,
    *,
    text: str = "a red heart",
    out: Path = Path("clip_guidance.png"),
    model: str = "latentdiff-mini",
    num_images: int = 4,
    steps: int = 25,
    scale: float = 300.0,
    seed: int = 0,
) -> dict[str, float]:
    """Sample without and with the guide, with an empty prompt, and score both.

    Args:
        clip: folder of a CLIP.
        text: the text that the guide scores images by.
        out: a .png file for both rows.
        model: a model's folder or name.
        num_images: images a row.
        steps: sampling steps.
        scale: factor of the cosine's gradient; its effect begins at some hundreds.
        seed: of the first image; the others count up from it.
    """
    pipe = LatentDiffPipeline.from_pretrained(model)
    scorer = load_clip(clip)
    guide = ClipGuide(scorer, pipe.vae, [text])
    images, scores = [], {}
    for name, settings in {
        "unguided": {},
        "guided": {"score_fn": guide, "score_scale": scale},
    }.items():
        prompts = [""] * num_images
        rows = pipe(prompts, num_inference_steps=steps, seed=seed, output_type="pt", **settings)
        pixels = 2 * rows.images - 1  # (B, 3, H, W) in [-1, 1]
        images += [to_pil(image) for image in pixels]
        scores[name] = float(scorer.score(pixels, [text] * num_images).mean())
    labels = [f"{name}: {text}" for name in scores for _ in range(num_images)]
    draw_grid(images, labels, columns=num_images).save(out)
    return scores


if __name__ == "__main__":
    print(json.dumps(auto_cli(main), indent=1))
