"""Configurations of other trainers: read, translated option by option, and reported line by line."""
