"""Built-in model families, found through the same entry points as third-party ones."""
