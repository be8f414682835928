"""The mathematics of diffusion. Nothing here knows about images, captions, networks or files."""
