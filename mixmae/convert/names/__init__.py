"""One dialect of tensor names per file: to our names, and back."""
