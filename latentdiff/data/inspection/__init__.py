"""The data report: statistics, near-duplicates and cost of a folder, as text, HTML and JSON."""
