"""One image: decode it, crop it, augment it, sum it up."""
