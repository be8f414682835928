"""What a stock U-Net is given besides: more outputs, more inputs, a ControlNet."""
