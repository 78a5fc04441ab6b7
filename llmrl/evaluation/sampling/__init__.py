"""Answers of a model with their rewards, as files to train on: `llmrl sample`.

`keys` says what is sampled and written, `making` does it; the formats are those of docs/data.md.
"""
