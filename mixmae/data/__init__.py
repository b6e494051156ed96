"""Images in, uint8 batches out: sources, order, decoding, augmentation and the Ray Data streams that execute them."""
