"""Child processes for work that can hang or crash: one pool, one protocol. Their users say what they do."""
