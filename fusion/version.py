"""The engine's version: another one may merge the same recipe to other bytes."""

VERSION = "0.5.0"
