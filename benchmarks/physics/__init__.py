"""Losses that differentiate the network: partial differential equations, energies and forces."""
