"""The web UI and the session behind it."""
