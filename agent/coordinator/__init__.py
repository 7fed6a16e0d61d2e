"""One epoch of a group across nodes: who is told what, when, and what is decided."""
