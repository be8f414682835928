"""A captioned folder read into records, every problem named."""
