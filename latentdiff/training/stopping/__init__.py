"""Verdicts during a run: still gaining, flat or overfitting; and its end where they say so."""
