"""The report of runs as one HTML page: curves, sheets, data, plan against measured, settings."""
