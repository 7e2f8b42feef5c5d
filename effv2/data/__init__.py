"""Images: their sources, sampling and splits, the cache of decoded images, and batches."""
