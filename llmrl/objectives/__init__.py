"""One file per method: pure functions from per-token log-probabilities to a loss; no models, no trainers."""
