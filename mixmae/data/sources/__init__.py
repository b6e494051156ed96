"""Every accepted layout of a collection of images, each read as a Source."""
