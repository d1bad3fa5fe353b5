"""Figures and pages drawn from what a run wrote down."""
