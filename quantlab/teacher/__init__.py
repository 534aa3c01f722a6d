"""The teacher: one client for everything that answers, a ledger that remembers what was paid, budgets that hold."""
