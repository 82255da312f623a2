"""The countdown numbers game for posttrain: puzzles, and a reward that checks the expression of an answer."""
