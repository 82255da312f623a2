"""Advantage estimators of posttrain: critic-free baselines and estimators with a critic. Depends on core alone."""
