"""Prompt learning: what trains are virtual tokens before the input, or keys and values before it. One file a method."""
