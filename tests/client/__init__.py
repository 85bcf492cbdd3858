"""Tests of a1111_client."""
