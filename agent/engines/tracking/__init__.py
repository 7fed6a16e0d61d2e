"""Which pages a running process wrote, behind one contract (base.py)."""
