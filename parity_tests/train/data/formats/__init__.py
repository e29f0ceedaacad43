"""Tests of token files that other programs wrote."""
