"""Krylov spaces: orthonormal bases, the recurrence that makes them, bounds on Ritz values."""
