"""Ring 3, how the world reaches us: edges, adapters, workers, wiring."""
