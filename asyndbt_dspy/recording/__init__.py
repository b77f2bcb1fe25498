"""What ties a compile to its ``run_dir``: fingerprints, recorded rollouts and events, and how they are read again."""
