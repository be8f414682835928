"""The CLIP recipe: a text encoder and an image encoder trained on captioned images."""
