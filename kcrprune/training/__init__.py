"""What runs over data."""
