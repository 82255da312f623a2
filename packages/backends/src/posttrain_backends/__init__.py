"""Model backends and rollout engines of posttrain, registered in `plugin.py`; frameworks are imported on use."""
