"""Evaluation: the metrics of a model on held-out images, and the report that shows them."""
