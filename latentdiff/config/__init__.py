"""Settings: names, types, defaults and ranges, a recipe or a section a file; no torch."""
