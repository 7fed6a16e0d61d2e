"""The ckpt-agent program: one file a verb; parses, calls, prints, exits, decides nothing."""
