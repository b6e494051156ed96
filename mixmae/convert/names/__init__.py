"""One dialect of parameter names per file: others' weights to ours, and back."""
