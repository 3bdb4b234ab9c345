"""Memory, communication and operations of a step."""
