"""Latents, prompt embeddings and masks on disk, encoded once and addressed by content."""
