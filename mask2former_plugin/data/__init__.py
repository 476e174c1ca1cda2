"""Data: training mappers, datasets, and the registration of both."""
