"""The loops beside the doors: each carries on what a crash may have left."""
