"""What methods share: blocks below the papers."""
