"""What methods on a fixed set of groups (pairs, segments, scored samples) are made of: `config` and `run`."""
