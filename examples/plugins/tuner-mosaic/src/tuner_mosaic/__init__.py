"""Mosaic for tuner."""
