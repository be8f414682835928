"""Components in Stable Diffusion's format: build, load, check; latents and prompt embeddings."""
