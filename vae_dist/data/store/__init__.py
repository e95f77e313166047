"""The data set directory: its format, reading it by number, and checking it."""
