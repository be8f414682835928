"""A run's training data: folder -> caches -> one sample -> one batch."""
