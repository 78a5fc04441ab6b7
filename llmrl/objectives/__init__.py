"""One file per method: pure functions from per-token log-probabilities to a loss. Nothing here knows of models or trainers."""
