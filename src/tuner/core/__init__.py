"""The model-agnostic core: it knows no model by name and imports neither plugins nor cli."""
