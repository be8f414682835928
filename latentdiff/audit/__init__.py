"""Receipts: what can be proved of a model and its data."""
