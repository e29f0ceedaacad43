"""Tests of the conversion program."""
