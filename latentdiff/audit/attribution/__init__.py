"""Attribution: which training images stand behind a generated image."""
