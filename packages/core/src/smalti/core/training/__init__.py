"""Training: one loop, the tasks it runs, and what they need."""
