"""The world around the worker in miniature: real HTTP on loopback, no mocks. For the demo and the tests alone."""
