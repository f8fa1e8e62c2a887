"""Memory banks: the greedy k-center coreset, K-means and exact nearest-neighbour search."""

from flawmap.neighbours.coreset import k_center_greedy
from flawmap.neighbours.kmeans import k_means
from flawmap.neighbours.search import k_nearest, nearest, search_index

__all__ = ["k_center_greedy", "k_means", "k_nearest", "nearest", "search_index"]
