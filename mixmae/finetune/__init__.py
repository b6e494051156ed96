"""Tasks that use a pretrained encoder: classification, linear probing, nearest neighbours."""
