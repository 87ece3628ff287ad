"""What `make_reliability.py` attacks, how, and what came of it."""
