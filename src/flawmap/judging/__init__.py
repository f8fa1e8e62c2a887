"""Verdicts from scores, and figures from verdicts. Needs numpy and scipy only."""
