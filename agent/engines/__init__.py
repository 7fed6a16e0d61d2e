"""How a member is captured and restored: one contract (base), one package an engine."""
