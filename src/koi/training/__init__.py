"""What surrounds a long training: checkpoints, signals, logs, progress."""
