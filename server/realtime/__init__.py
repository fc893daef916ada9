"""The engine room: transport, rooms, bus, recovery. It knows room keys, watermarks and bytes, not orders."""
