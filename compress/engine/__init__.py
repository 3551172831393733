"""What every pass is, and the walk that applies passes block by block."""
