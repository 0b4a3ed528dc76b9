"""What can be done to a run: one module a verb. Each writes the row and its transition together, and tells viewers after the commit."""
