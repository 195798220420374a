"""The mathematics: Fisher, K-FAC, coarse spaces, corrections and what they are worth. Knows no other room."""
