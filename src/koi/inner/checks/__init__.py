"""What engines take for granted, and whether they agree with the plainest way."""
