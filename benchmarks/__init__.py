"""Speed, quality, and the report."""
