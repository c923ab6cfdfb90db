"""Somebody else's package: himoe knows nothing of it, and finds it by `"third_party.annealed:AnnealedBias"`."""
