"""Tasks that use a pretrained encoder: classification now."""
