"""Memory banks: the greedy k-center coreset and exact nearest-neighbour search."""

from flawmap.neighbours.coreset import k_center_greedy
from flawmap.neighbours.search import half_squared_norms, k_nearest, nearest

__all__ = ["half_squared_norms", "k_center_greedy", "k_nearest", "nearest"]
