"""The sections of the report, one a file, and the HTML page."""
