"""Ring 2, what may be asked: one verb = one async function = one transaction."""
