"""Several recipes in one run, with the front and a choice: `sweep(SweepRequest(...))`. Read run.py first."""
