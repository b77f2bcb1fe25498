"""What a run leaves behind: results, curves, progress."""
