"""From image files and captions to batches: index, captions, buckets, images, cache, order, loader."""
