"""What several studies share: networks, tables, measured rows and exercises."""
