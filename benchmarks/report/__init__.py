"""What is written and shown of a measurement."""
