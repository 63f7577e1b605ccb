"""Adapters: choosing modules, layers of every kind, file formats, and the tools that work on adapter files."""
