"""From the prompts and sizes of a call to the conditioning that the U-Net reads."""
