"""Which captions a run encodes."""
