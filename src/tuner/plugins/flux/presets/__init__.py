"""Starting points for configurations: each file holds only what differs from the defaults."""
