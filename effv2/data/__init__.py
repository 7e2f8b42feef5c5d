"""Images: where they come from, how they are sampled, split, decoded once, and served in batches."""
