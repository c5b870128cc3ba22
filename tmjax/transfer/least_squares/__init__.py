"""Linear algebra of the operator `predictions`: sums over positions, ridge systems."""
