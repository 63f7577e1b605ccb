"""What keys mean, and where the values of a configuration come from."""
