"""Advantages that an outlying reward does not spoil: an estimator for posttrain."""
