"""The one copy of the language model: packing, forward, log-prob head, reference, update, and its state."""
