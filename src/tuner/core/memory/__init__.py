"""Trading memory against recomputation and transfers; every service replaces ``block.forward`` in place."""
