"""Parquet shards: written, packed from any source, and the built-in sets."""
