"""Starting points for configurations."""
