"""What people look at: the terminal now; reports and trackers beside it."""
