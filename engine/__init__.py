"""Run a model: families, loading, guidance, samplers, runners, generation."""
