"""What several test files make or run. Importable as `helpers` (pytest's `pythonpath`)."""
