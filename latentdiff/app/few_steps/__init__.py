"""Two models next to each other: a distilled one and its teacher, or one in fewer steps."""
