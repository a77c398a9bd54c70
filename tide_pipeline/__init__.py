"""Self-improving speculative decoding: serve, capture, notice drift, retrain the draft, prove it, roll it out."""

__version__ = "0.1.0"
