"""The parallax command, one file per verb."""
