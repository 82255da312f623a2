"""Losses for posttrain: policy-gradient, value and likelihood objectives, KL estimators and their controllers.

Components are found by name through `plugin.py`; the classes are importable from their modules. Knows no framework.
"""
