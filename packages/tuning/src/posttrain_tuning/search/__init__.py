"""Searches over settings: what is asked for (`plan`), trials as runs of their own (`running`, `jobs`), what came of
them (`study`, `page`, `winners`).
"""
