"""Every quality figure: pure functions on scores, and the running of models that gives the scores."""
