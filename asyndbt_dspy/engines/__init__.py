"""Engines carry messages between the pure machines and interpret their instructions."""
