"""Ring 1, what is true: tables and the rules that guard them. No await, no clock, no network."""
