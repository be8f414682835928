"""Faster CPU code for stock diffusers modules: fused for training, packed for sampling."""
