"""Plots, panels and files: what draws and moves results, and knows none of the studies."""
