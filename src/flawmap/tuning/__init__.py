"""Settings chosen on synthetic defects, or by the oracle beside them."""
