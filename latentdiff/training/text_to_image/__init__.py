"""The text-to-image recipe: a U-Net, and a text encoder where the run trains one."""
