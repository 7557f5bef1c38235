"""The proof: throughput, quality, and the report."""
