"""What scripts/compare_subject.py may be told; imports nothing heavy."""

from dataclasses import dataclass

UNRELATED = (
    "a red car",
    "a green apple",
    "a yellow face",
    "a blue house",
    "a tree",
    "a slice of pizza",
    "a bicycle",
    "an open book",
    "a city at night",
    "a mountain with snow",
    "a cup of coffee",
    "a person with a hat",
    "a rocket",
    "a bird",
    "a guitar",
    "a bunch of flowers",
)


@dataclass(frozen=True)
class SubjectOptions:
    """What is drawn, and how.

    Args:
        prompt: what the tuned model calls the subject, such as "a photo of sks dog".
        base_prompt: what the base model is asked for; empty: the same.
        unrelated: prompts that should not have changed; ten or more.
        num_seeds: pictures of the subject by each model.
        num_steps: sampling steps.
        guidance_scale: classifier-free guidance.
    """

    prompt: str
    base_prompt: str = ""
    unrelated: tuple[str, ...] = UNRELATED
    num_seeds: int = 16
    num_steps: int = 30
    guidance_scale: float = 5.0
