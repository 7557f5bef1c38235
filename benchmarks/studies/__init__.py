"""What produced a figure of the docs."""
