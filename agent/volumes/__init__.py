"""Where bytes rest: one contract (base), one module a kind of volume."""
