"""Published weights: found and verified, evaluated with their own transforms, ranked with paired statistics."""
