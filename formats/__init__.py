"""Files on disk: names, bytes and metadata. Knows no module."""
