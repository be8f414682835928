"""Many images with one model, resumable; opening a pipeline; models converted and packed."""
