"""The page served at /. Assets only."""
