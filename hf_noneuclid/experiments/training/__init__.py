"""Options, data, models and results: what the three recipes need."""
