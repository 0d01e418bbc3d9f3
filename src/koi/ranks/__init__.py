"""Several processes that learn one φ."""
