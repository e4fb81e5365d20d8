"""Comparisons and measurements: run from the checkout, no part of the package."""
