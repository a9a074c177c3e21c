"""Scores: encoders, pure metrics on features, statistics, results that can be compared."""
