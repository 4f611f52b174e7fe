"""Krylov spaces: bases, the recurrence that makes them, what to find there and how well."""
