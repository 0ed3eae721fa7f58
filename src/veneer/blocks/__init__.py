"""Whole modules that are trained beside the adapters."""
