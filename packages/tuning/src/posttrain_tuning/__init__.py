"""Hyper-parameter search and memory planning of posttrain. Names are registered in `plugin.py`."""
