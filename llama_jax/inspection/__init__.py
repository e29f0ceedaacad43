"""What an architecture consists of, and what its mask lets a token see."""
