"""The inner loop compiled; imported only where ``compile`` asks for it."""
