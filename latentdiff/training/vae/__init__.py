"""The VAE recipe: an autoencoder trained on random crops of images."""
