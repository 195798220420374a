"""The command line: lists the notebooks and regenerates and compares their figures."""
