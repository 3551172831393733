"""The command line. Imports nothing heavy."""
