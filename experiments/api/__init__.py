"""REST under /api/v1: everything that a page can do."""
