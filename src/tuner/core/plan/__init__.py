"""Predicting a run from the facts of its model: memory, disk and time of each phase, before any weight is read."""
