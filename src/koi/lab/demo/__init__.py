"""The page to play with: draw shapes and watch a network learn them from one example each."""
