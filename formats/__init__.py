"""Files on disk: names, bytes and metadata. No file in here builds a model."""
