"""From captioned folders to latents, prompt embeddings and masks; every fault is named."""
