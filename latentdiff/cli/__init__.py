"""The commands: each parses its options and calls the library; main.py has the table of all."""
