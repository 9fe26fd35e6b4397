"""The wire contract: messages and services, with their generated modules."""
