"""Callbacks that let other people's training loops measure and steer their rate."""
