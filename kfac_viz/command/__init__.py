"""The command line: lists the notebooks and regenerates their figures."""
