"""The kinds of random tries that ``tests/fuzz.py`` runs, their networks, hostile values and oracles."""
