"""What moves: φ, arithmetic on it, and the meta-update."""
