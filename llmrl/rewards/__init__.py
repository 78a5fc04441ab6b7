"""Scores of what a model wrote: verifiers and reward functions. Nothing here knows of a trainer."""
