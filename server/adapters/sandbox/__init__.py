"""Simulators of the gateways: same bodies, errors, signatures and habits, over real HTTP on this machine only."""
