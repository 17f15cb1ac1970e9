"""Ways to draft, one a file, and the table of all methods (methods.py)."""
