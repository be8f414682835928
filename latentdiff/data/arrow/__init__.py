"""Columns of many rows in arrow: listings, and tables kept between runs."""
