"""The inner loop: from φ, a few optimizer steps on each task. One interface, many engines."""
