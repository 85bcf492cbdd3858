"""Small versions of the services that the worker uses. Real HTTP on loopback, no mocks. Only for demo and tests."""
