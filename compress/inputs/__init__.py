"""Data: files to token windows, images or prompts."""
