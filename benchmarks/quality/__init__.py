"""What image quality is measured by."""
