"""What runs leave behind: a directory each, and the leaderboard made from them."""
