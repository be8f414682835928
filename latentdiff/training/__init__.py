"""Training: three recipes (text-to-image, vae/, clip/) on one loop, checkpoint, resume and log."""
