"""What speed is measured of, and how."""
