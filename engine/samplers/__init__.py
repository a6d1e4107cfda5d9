"""Samplers: one file a method, each a function of (problem, noise, options) made of pure steps."""
