"""The metrics of all runs in one SQLite file: a tracker for posttrain."""
