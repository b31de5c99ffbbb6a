"""Helm chart and Compose file that serve a bundle."""
