"""Layers in the forms in which many tasks can run at once."""
